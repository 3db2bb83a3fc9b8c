"""Weights for a model that comes without any: trained once, kept in storage."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import utils.training
from data.base import DataBundle, Task, Weighing
from models.base import Batch, PrunableModel
from models.checkpoint import fill, tensors_of
from utils.code import code_hash
from utils.distributed import divided
from utils.memory import Portions, rows_of
from utils.progress import followed
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


def task_loss(model: PrunableModel, data: DataBundle, settings: Training) -> Callable[..., Tensor]:
    """The task's own loss of a model on a batch; of some rows of one, weighed by their share of the whole batch."""

    def loss(batch: Batch, whole: Batch | None = None) -> Tensor:
        placed = model.place(rows_to_answer(batch, whole))
        logits, share = model.logits(placed), share_of(data.task, batch, whole)
        return data.task.loss(logits, placed, settings.label_smoothing) * share if share else nothing(logits)

    return loss


def rows_to_answer(rows: Batch, whole: Batch | None) -> Batch:
    """Some rows of a batch; where there are none, its first one, which must not count."""
    if whole is None or len(next(iter(rows.values()))):
        return rows
    return {name: tensor[:1] for name, tensor in whole.items()}


def share_of(task: Task, rows: Batch, whole: Batch | None) -> float:
    """Part of a batch's mean loss that falls to some of its rows; 1 for all of them (None)."""
    if whole is None:
        return 1.0
    weight = task.weight if isinstance(task, Weighing) else samples_in
    return weight(rows) / max(weight(whole), 1)


def samples_in(batch: Batch) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def nothing(logits: Tensor) -> Tensor:
    """A loss of 0 whose gradients are zeros, not missing."""
    return logits.float().sum() * 0.0


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
def validate(model: PrunableModel, data: DataBundle, joint: bool = True) -> dict[str, float]:
    """Mean loss and the task's own quality on the validation split, as `validation_<name>`.

    Args:
        model: What is scored.
        data: The split.
        joint: Whether the processes of a run share the batches; not where each holds but a part of the weights.
    """
    sums: dict[str, float] = {}
    samples = 0
    portions = Portions("validation")

    def terms(batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        count = samples_in(batch)

        def part(rows: range) -> dict[str, float]:
            some = rows_of(batch, rows)
            placed = model.place(some)
            logits = model.logits(placed)
            quality = {name: float(values.sum()) for name, values in data.task.quality(logits, placed).items()}
            share = share_of(data.task, some, None if len(rows) == count else batch)
            return {"loss": float(data.task.loss(logits, placed)) * share * count if share else 0.0, **quality}

        parts = [*portions.each(count, part)]
        return {}, {"samples": count} | {name: sum(found[name] for found in parts) for name in parts[0]}

    split = followed("validation", data.validation)
    for _, found in divided(split, terms) if joint else map(terms, split):
        samples += found.pop("samples")
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
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
