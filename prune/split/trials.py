"""Trials on calibration data: how far the answers move when units alone go, and when tokens alone do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.pretrained import samples_in
from prune.gates import calibration_of, undisturbed
from prune.repair.batches import regrouped
from utils.errors import InputError
from utils.memory import Portions, rows_of
from utils.progress import progress_bar

# samples of a batch, batches that consumers are refitted to, and batches that are judged by
TOGETHER, FITTED, JUDGED = 32, 3, 3

Trial = Callable[[float, Sequence[Batch]], PrunableModel]


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
    model: PrunableModel, data: DataBundle, parts: Parts, trials: Sequence[Trial], ratios: Iterable[float], title: str
) -> list[tuple[float, float, int]]:
    """Mean divergence from the dense model's answers at each ratio that can be had, by the best of several ways.

    Args:
        model: The dense model.
        data: Says what a divergence is.
        parts: Calibration samples.
        trials: Each makes a pruned model of a ratio; an InputError says that it can't be had.
        ratios: Ascending.
        title: Label of the progress bar.

    Returns:
        The ratio, the divergence, and which of the ways it was.
    """
    wanted, found, dense = list(ratios), [], answers(model, parts.judged)
    with progress_bar(title, len(wanted) * len(trials)) as advance:
        for ratio in wanted:
            tries = []
            for number, trial in enumerate(trials):
                try:
                    pruned = trial(ratio, parts.fitted)
                except InputError:
                    continue
                tries.append((divergence(dense, pruned, data, parts.judged), number))
                advance(f"{ratio:g}")
            if not tries:
                break
            found.append((ratio, *min(tries)))
    return found


@torch.inference_mode()
def answers(model: PrunableModel, batches: Sequence[Batch]) -> list[Tensor]:
    """What a model answers to each batch; models whose tokens merge answer with little, one row a sample."""
    found, portions = [], Portions("answers")
    with undisturbed(model.network):
        for batch in batches:

            def part(rows: range, batch: Batch = batch) -> Tensor:
                return model.logits(model.place(rows_of(batch, rows)))

            found.append(torch.cat(list(portions.each(samples_in(batch), part))))
    return found


@torch.inference_mode()
def divergence(wanted: Sequence[Tensor], pruned: PrunableModel, data: DataBundle, batches: Sequence[Batch]) -> float:
    """How far a model's answers are from those wanted, the mean over samples.

    Args:
        wanted: The dense model's `answers`, batch by batch.
        pruned: The model.
        data: Says what a divergence is.
        batches: Samples.
    """
    total = 0.0
    for given, right in zip(answers(pruned, batches), wanted, strict=True):
        total += float(data.task.divergence(given, right, 1.0)) * len(right)
    return total / max(sum(map(len, wanted)), 1)
