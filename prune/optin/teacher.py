"""The dense model on one calibration batch: what OPTIN's candidates are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from models.merging import Reduction
from prune.gates import gated
from prune.optin.losses import draw_rows, feature_rows, sampled, token_gram
from prune.optin.precision import Precision, in_float32
from prune.optin.trajectory import Recorded, calls_before
from utils.errors import InputError
from utils.hooks import captured


@dataclass(frozen=True)
class Settings:
    """What the losses depend on.

    Attributes:
        rows: Feature rows that stand for a batch, K.
        temperature: Its square is the factor of the logits' divergence.
        seed: Of the row sampler.
        memory_gb: What the candidates of one pass may take.
        precision: What passes are computed in.
        pads: Whether rows of padding count, as in the released code.
    """

    rows: int = 768
    temperature: float = 4.0
    seed: int = 0
    memory_gb: float = 4.0
    precision: Precision = "float32"
    pads: bool = False


@dataclass
class Teacher:
    """The dense model on one batch.

    Attributes:
        batch: The batch, on the model's device.
        logits: Its logits.
        blocks: Output of every block.
        embedding: What ran before the first of them.
        rows: Which feature rows stand for each feature point; None means all.
        features: Those rows, normalised, (K, d).
        grams: Per feature point the samples' Gram over all rows, (B, B), which tokens are judged by.
    """

    batch: Batch
    logits: Tensor
    blocks: list[object]
    embedding: list[Recorded] = field(default_factory=list)
    rows: dict[str, Tensor | None] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)


def refuse_without_trajectory(model: PrunableModel) -> None:
    """Raise an InputError if the model names no feature point for each of its blocks, or merges tokens already.

    A block that asks for the tokens in front alone can't be replayed either.
    """
    points, blocks = len(model.feature_points()), len(model.blocks())
    if not blocks or points < blocks:
        raise InputError(
            f"prune=optin: model={model.name} names {points} feature points for {blocks} blocks; it needs one a block"
        )
    in_front = isinstance(model.reduction, Reduction) and model.reduction.front_only
    if in_front or (model.reduction is not None and model.reduction.merges):
        raise InputError(f"prune=optin: the tokens of model={model.name} are merged already; score the unmerged model")


def has_final(model: PrunableModel) -> bool:
    """Whether a feature point lies behind the last block."""
    return len(model.feature_points()) > len(model.blocks())


def compared_points(model: PrunableModel, layer: int) -> list[str]:
    """Feature points that a unit of a layer is judged by: those behind it; the last layer its own too."""
    points, last = model.feature_points(), len(model.blocks()) - 1
    return [*points[layer if layer == last else layer + 1 :]]


def observe(model: PrunableModel, batch: Batch, settings: Settings) -> Teacher:
    """Run the dense model once and keep what candidates are compared with."""
    points = model.feature_points()
    with captured(model.network, model.blocks()) as outputs, captured(model.network, points) as found:
        logits = model.logits(batch)
    embedding = calls_before(model, batch, model.blocks()[0])
    teacher = Teacher(batch, logits, [outputs[name] for name in model.blocks()], embedding)
    for name in points:
        rows = rows_for(batch, feature_rows(found[name], axis=model.feature_axis).shape[1], settings)
        teacher.rows[name] = None if rows is None else rows.to(logits.device)
        teacher.features[name] = sampled(found[name], teacher.rows[name], axis=model.feature_axis)[0]
        with in_float32(logits.device):
            teacher.grams[name] = token_gram(found[name], axis=model.feature_axis)[0]
    if (largest := max(len(rows) for rows in teacher.features.values())) < 2:
        raise InputError(f"prune=optin: a calibration batch gives {largest} feature rows; the Gram needs at least 2")
    return teacher


def rows_for(batch: Batch, count: int, settings: Settings) -> Tensor | None:
    """Which of a feature point's rows stand for it, on the CPU; None means all.

    Args:
        batch: All samples; rows of their padding are left out where the point has a row a token.
        count: Rows that the point gives for them.
        settings: See `Settings`.
    """
    mask = batch.get("attention_mask")
    valid = mask.bool() if mask is not None and mask.numel() == count and not settings.pads else None
    return draw_rows(count, settings.rows, valid, settings.seed)


def leaked_outputs(model: PrunableModel, batch: Batch, layer: int) -> list[object]:
    """Outputs of all blocks with the last head of every block before `layer` masked.

    The released code does not reset its head mask between layers, so that candidates of a layer
    are scored behind such a prefix.
    """
    gates: dict[str, Tensor] = {}
    for group in model.unit_groups():
        if group.kind == "head" and group.layer < layer and group.count:
            gates[group.name] = torch.ones(group.count)
            gates[group.name][-1] = 0
    with gated(model, gates), captured(model.network, model.blocks()) as outputs:
        model.logits(batch)
    return [outputs[name] for name in model.blocks()]


def tensors_of(values: object) -> Sequence[Tensor]:
    """All tensors in an output, tuples opened."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for part in values for tensor in tensors_of(part)] if isinstance(values, tuple) else []
