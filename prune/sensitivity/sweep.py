"""The layer sweep and the ablation: every part by itself, at every ratio, each row kept as soon as it is measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from models.cost import CostModel
from prune.gates import gated, undisturbed
from prune.sensitivity.passes import Figures, SuffixPasses, zeroed
from prune.weights.matrices import Matrix, linear_of
from prune.whole.threshold import lowest
from utils.distributed import divided
from utils.progress import progress_bar
from utils.storage import Artifact, Scratch

Row = dict[str, Any]
Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Trial:
    """One change to measure.

    Attributes:
        key: Names it; the same in a run that goes on.
        layer: The first block that it changes.
        row: What is known of it without measuring.
        change: Makes it for the time of a `with`.
    """

    key: str
    layer: int
    row: Row
    change: Change


def unit_trials(
    model: PrunableModel, group: UnitGroup, scores: Tensor, grid: Sequence[float], costs: CostModel
) -> Iterator[Trial]:
    """Take the lowest units of one group away, as many as each ratio says; a repeated number is left out."""
    done = {0}
    for ratio in grid:
        count = floor(ratio * group.count + 1e-9)
        if count in done:
            continue
        done.add(count)
        gone = lowest_units(scores, count)
        kept = costs.counts | {group.name: group.count - count}
        freed = {what: costs.total(what) - costs.total(what, kept) for what in ("macs", "params")}
        row = {
            "part": group.name, "kind": group.kind, "layer": group.layer, "ratio": count / group.count,
            "removed": count, "count": group.count, "predicted": float(scores[gone].double().sum()), **freed,
        }  # fmt: skip
        yield Trial(f"{group.name}@{count}", group.layer, row, _masking(model, group, gone))


def lowest_units(scores: Tensor, count: int) -> Tensor:
    """Indices of the units that the search would take first, (count,)."""
    return scores.argsort(descending=True, stable=True).flip(0)[:count]


def weight_trials(model: PrunableModel, matrix: Matrix, scores: Tensor, grid: Sequence[float]) -> Iterator[Trial]:
    """Zero the lowest weights of one linear; nothing is freed but what a sparse format saves."""
    weight, done = linear_of(model.network, matrix.name).weight, {0}
    for ratio in grid:
        count = floor(ratio * matrix.size + 1e-9)
        if count in done:
            continue
        done.add(count)
        mask = lowest(scores, count)
        row = {
            "part": matrix.name, "kind": "weight", "layer": matrix.layer, "ratio": count / matrix.size,
            "removed": count, "count": matrix.size, "predicted": float(scores[mask].double().sum()), "macs": 0,
            "params": 0,
        }  # fmt: skip
        yield Trial(f"{matrix.name}@{count}", matrix.layer, row, _zeroing(weight, mask))


def ablation_trials(
    model: PrunableModel, group: UnitGroup, predictions: Mapping[str, Tensor], bins: int
) -> Iterator[Trial]:
    """Every unit of a small group alone, the units of a large one in random bins of like size."""
    order = torch.randperm(group.count, generator=torch.Generator().manual_seed(group.layer))
    parts = order.tensor_split(min(bins, group.count)) if group.count > 2 * bins else order.sort().values.split(1)
    for number, units in enumerate(parts):
        row = {
            "part": group.name, "kind": group.kind, "layer": group.layer, "units": units.tolist(),
            "predicted": {name: float(values[units].double().sum()) for name, values in predictions.items()},
        }  # fmt: skip
        yield Trial(f"{group.name}#{number}", group.layer, row, _masking(model, group, units))


def _masking(model: PrunableModel, group: UnitGroup, gone: Tensor) -> Change:
    gate = torch.ones(group.count)
    gate[gone] = 0.0
    return lambda: gated(model, {group.name: gate})


def _zeroing(weight: Tensor, mask: Tensor) -> Change:
    return lambda: zeroed(weight, mask)


def swept(
    model: PrunableModel, data: DataBundle, batches: Sequence[Batch], trials: Sequence[Trial], scratch: Scratch | None,
    keep: Mapping[str, Tensor],
) -> tuple[Figures, list[Row]]:  # fmt: skip
    """Measure every trial, in the order of their blocks, going on with what was measured before.

    Args:
        model: The model; left exactly as it was.
        data: The task.
        batches: What is answered.
        trials: What to measure.
        scratch: Where each row is kept.
        keep: Tensors to keep beside the rows.

    Returns:
        Figures of the unchanged model; the trials' rows with `loss_change`, `divergence` and `quality_change`.
    """
    left = scratch.load() if scratch is not None else None
    found: dict[str, Row] = dict(left.facts["rows"]) if left else {}
    ordered = sorted(trials, key=lambda trial: trial.layer)
    done = sum(trial.key in found for trial in ordered)
    with undisturbed(model.network), progress_bar("sensitivity", len(ordered), done) as advance:
        passes = SuffixPasses(model, batches, data.task)
        waiting = [trial for trial in ordered if trial.key not in found]

        def measured(trial: Trial) -> tuple[dict[str, Tensor], Row]:
            passes.go_to(trial.layer)
            with trial.change():
                return {}, trial.row | _changes(passes.dense, passes.measure())

        for trial, (_, row) in zip(waiting, divided(waiting, measured, in_rounds=True), strict=True):
            found[trial.key] = row
            if scratch is not None:
                scratch.save(Artifact(dict(keep), {"rows": found}))
            advance(trial.key)
    return passes.dense, [found[trial.key] for trial in trials]


def _changes(dense: Figures, now: Figures) -> Row:
    quality = None if now.quality is None or dense.quality is None else now.quality - dense.quality
    return {"loss_change": now.loss - dense.loss, "divergence": now.divergence, "quality_change": quality}


def plain(figures: Figures) -> dict[str, float | None]:
    """Figures as plain values."""
    return asdict(figures)
