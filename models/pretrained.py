"""Weights for a model that comes without any: trained once, kept in storage."""

import hashlib
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import utils.training
from data.base import DataBundle
from models.base import Batch, PrunableModel
from utils.seed import random_state_restored, seed_everything
from utils.storage import Artifact, Store, folder_name
from utils.training import History, Training, fit


def with_weights(model: PrunableModel, data: DataBundle, store: Store, seed: int) -> tuple[PrunableModel, History]:
    """Give a model its weights: train it on first use, load them from storage afterwards.

    A model that brought its weights along is returned as it is, with an empty history.
    The checkpoint's key holds everything that shapes it: architecture, source code, training
    data and settings, seed, torch version and device type.
    """
    if model.training is None:
        return model, []
    settings: Training = model.training

    def compute() -> Artifact:
        history = train(model, data, settings, seed)
        return Artifact(model.network.state_dict(), {"history": history})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, "checkpoint", _key(model, data, settings, seed), compute)
    model.network.load_state_dict(found.artifact.tensors)
    return model, found.artifact.facts["history"]


def train(model: PrunableModel, data: DataBundle, settings: Training, seed: int) -> History:
    """Train a model in place on a bundle's train split; the same for the same seed."""

    def loss_of(batch: Batch, label_smoothing: float) -> torch.Tensor:
        placed = model.place(batch)
        return data.task.loss(model.logits(placed), placed, label_smoothing)

    @torch.inference_mode()
    def score() -> dict[str, float]:
        losses, samples = 0.0, 0
        for batch in data.validation:
            placed = model.place(batch)
            count = len(batch["labels"])
            losses += float(data.task.loss(model.logits(placed), placed)) * count
            samples += count
        return {"validation_loss": losses / samples}

    with random_state_restored():
        seed_everything(seed)
        return fit(model.network, loss_of, data.train, settings, score, title=f"train {model.name}")


def _key(model: PrunableModel, data: DataBundle, settings: Training, seed: int) -> dict[str, Any]:
    sources = [inspect.getsourcefile(type(model)), inspect.getsourcefile(utils.training)]
    code = b"".join(Path(path).read_bytes() for path in sources if path)
    return {
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "initial_weights": model.fingerprint(),
        "code": hashlib.sha256(code).hexdigest(),
        "train": data.fingerprints["train"],
        "training": asdict(settings),
        "seed": seed,
        "torch": torch.__version__,
        "device": model.device.type,
    }
