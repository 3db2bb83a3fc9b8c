"""Weights for a model that comes without any: trained once, kept in storage."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import utils.training
from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.checkpoint import fill, tensors_of
from utils.code import code_hash
from utils.storage import Artifact, Scratch, Store, folder_name
from utils.training import History, Trained, Training, fit


def with_weights(model: PrunableModel, data: DataBundle, store: Store, seed: int) -> tuple[PrunableModel, History]:
    """Give a model its weights: train it on first use, load them from storage afterwards.

    A model that brought its weights along is returned as it is, with an empty history.
    The checkpoint's key holds everything that shapes it: architecture, source code, training
    data and settings, seed, torch version and device type.
    """
    if model.training is None:
        return model, []
    settings: Training = model.training

    def compute(scratch: Scratch) -> Artifact:
        trained = train(model, data, settings, seed, task_loss(model, data, settings), f"train {model.name}", scratch)
        return Artifact(tensors_of(model), {"history": trained.history})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, "checkpoint", _key(model, data, settings, seed), compute)
    fill(model, found.artifact.tensors)
    return model, found.artifact.facts["history"]


def task_loss(model: PrunableModel, data: DataBundle, settings: Training) -> Callable[[Batch], Tensor]:
    """The task's own loss of a model on a batch."""

    def loss(batch: Batch) -> Tensor:
        placed = model.place(batch)
        return data.task.loss(model.logits(placed), placed, settings.label_smoothing)

    return loss


def train(
    model: PrunableModel,
    data: DataBundle,
    settings: Training,
    seed: int,
    loss: Callable[[Batch], Tensor],
    title: str,
    scratch: Scratch | None = None,
) -> Trained:
    """Train a model in place on a bundle's train split; the same for the same seed."""
    return fit(model.network, loss, data.train, settings, lambda: validate(model, data), seed, title, scratch)


@torch.inference_mode()
def validate(model: PrunableModel, data: DataBundle) -> dict[str, float]:
    """Mean loss and the task's own quality on the validation split, as `validation_<name>`."""
    sums: dict[str, float] = {}
    samples = 0
    for batch in data.validation:
        placed = model.place(batch)
        logits, count = model.logits(placed), len(next(iter(batch.values())))
        sums["loss"] = sums.get("loss", 0.0) + float(data.task.loss(logits, placed)) * count
        for name, values in data.task.quality(logits, placed).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
        samples += count
    return {f"validation_{name}": total / samples for name, total in sums.items()}


def _key(model: PrunableModel, data: DataBundle, settings: Training, seed: int) -> dict[str, Any]:
    return {
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "initial_weights": model.fingerprint(),
        "code": code_hash(type(model), *model.code, type(data.task), utils.training),
        "train": data.fingerprints["train"],
        "training": asdict(settings),
        "seed": seed,
        "torch": torch.__version__,
        "device": model.device.type,
    }
