"""Trials on calibration data: how far the answers move when units alone go, and when tokens alone do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.pretrained import samples_in
from prune.gates import calibration_of, undisturbed
from prune.repair.batches import regrouped
from utils.errors import Unreachable
from utils.memory import Portions, rows_of
from utils.progress import progress_bar

# samples of a batch, batches that consumers are refitted to, and batches that are judged by
TOGETHER, FITTED, JUDGED = 32, 3, 3
# samples after which a trial may end: it has then lost more than the best one
ASIDE = 8

Trial = Callable[[float], PrunableModel]


@dataclass(frozen=True)
class Parts:
    """Calibration samples in two parts; the same ones where there are too few.

    Attributes:
        fitted: What consumers may be refitted to.
        judged: What answers are compared on.
    """

    fitted: Sequence[Batch]
    judged: Sequence[Batch]

    @classmethod
    def of(cls, data: DataBundle) -> "Parts":
        """The first samples and those behind them."""
        batches = regrouped(calibration_of(data).calibration, TOGETHER)
        judged = batches[FITTED : FITTED + JUDGED]
        return cls(batches[:FITTED], judged or batches[:FITTED])


def tried(
    dense: Tensor, data: DataBundle, judged: Sequence[Batch], trials: Sequence[Trial], ratios: Iterable[float],
    title: str,
) -> list[tuple[float, float, int]]:  # fmt: skip
    """Mean divergence from the dense model's answers at each ratio that can be had, by the best of several ways.

    A divergence is never negative, so that a way ends as soon as it has lost more than the best one in all. What was
    lost most at one ratio comes first at the next, where that is then known sooner.

    Args:
        dense: The dense model's `answers`, (N, *).
        data: Says what a divergence is.
        judged: Calibration samples, N in all.
        trials: Each makes a pruned model of a ratio; Unreachable says that it can't be had.
        ratios: Ascending.
        title: Label of the progress bar.

    Returns:
        The ratio, the divergence, and which of the ways it was.
    """
    wanted, found, ways, order = list(ratios), [], list(range(len(trials))), torch.arange(len(dense))
    with progress_bar(title, len(wanted) * len(trials)) as advance:
        for ratio in wanted:
            tries: dict[int, Tensor] = {}
            best = inf, 0
            for way in ways:
                try:
                    pruned = trials[way](ratio)
                except Unreachable:
                    continue
                tries[way] = losses(dense, pruned, data, judged, order, best[0])
                best = min((float(lost.mean()), way) for way, lost in tries.items())
                advance(f"{ratio:g}")
            if not tries:
                break
            found.append((ratio, *best))
            # of all ways the last best one is likely to be so again
            ways.sort(key=lambda way, first=best[1]: way != first)
            order = tries[best[1]].argsort(descending=True, stable=True)
    return found


@torch.inference_mode()
def answers(model: PrunableModel, batches: Sequence[Batch]) -> Tensor:
    """What a model answers to all samples, (N, *); models whose tokens merge answer with little, one row a sample."""
    portions = Portions("answers")
    with undisturbed(model.network):
        return torch.cat([_answer(model, batch, portions) for batch in batches])


def _answer(model: PrunableModel, batch: Batch, portions: Portions) -> Tensor:
    parts = portions.each(samples_in(batch), lambda rows: model.logits(model.place(rows_of(batch, rows))))
    return torch.cat(list(parts))


@torch.inference_mode()
def losses(
    wanted: Tensor, pruned: PrunableModel, data: DataBundle, batches: Sequence[Batch], order: Tensor | None = None,
    most: float = inf,
) -> Tensor:  # fmt: skip
    """How far a model's answer to each sample is from the one wanted.

    Args:
        wanted: The dense model's `answers`, (N, *).
        pruned: The model.
        data: Says what a divergence is.
        batches: Samples, N in all.
        order: In which they are looked at, (N,); None for as they come.
        most: Once their mean is sure to be more, the others are not looked at.

    Returns:
        (N,), float64, on the CPU; infinite for samples that were not looked at.
    """
    order, portions = torch.arange(len(wanted)) if order is None else order, Portions("answers")
    found = torch.full((len(wanted),), inf, dtype=torch.float64)
    with undisturbed(pruned.network):
        for rows, batch in zip(order.split(ASIDE), regrouped(batches, ASIDE, order), strict=True):
            pairs = zip(_answer(pruned, batch, portions), wanted[rows.to(wanted.device)], strict=True)
            found[rows] = torch.tensor(
                [float(data.task.divergence(given[None], right[None], 1.0)) for given, right in pairs],
                dtype=torch.float64,
            )
            # a little more, as equal ways may differ by rounding here
            if float(found[found.isfinite()].sum()) > most * (1 + 1e-9) * len(wanted):
                break
    return found
