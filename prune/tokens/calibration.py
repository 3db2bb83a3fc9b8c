"""What token methods learn from calibration data: thresholds, how many tokens stay, whether scores differ at all.

Shapes: B samples, L blocks, N scores of all samples together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from models.keeping import Keeping
from models.keeping_flow import KeepingFlow, Listener, flow_of, watched_tokens
from models.token_cost import TokenCosts
from prune.repair.batches import at_most, largest
from prune.tokens.rules import Above
from prune.tokens.selection import spread, threshold_at
from utils.errors import InputError
from utils.memory import restarted
from utils.progress import followed

# below this part of their median, scores tell tokens apart by rounding alone
LEAST_SPREAD = 1e-3
NEAR = 0.002
TRIES = 10


class _Enough(Exception):
    """Ends a pass once the scores that were wanted have been seen."""


@dataclass(frozen=True)
class Measured:
    """What a keeping does to the calibration samples.

    Attributes:
        counts: Tokens that enter attention and MLP, (B, L, 2).
        dense: Tokens of each sample before any goes, (B,).
        spreads: Per reducing block how far its scores lie apart; None where there are none.
    """

    counts: Tensor
    dense: Tensor
    spreads: Mapping[int, float | None]

    def removed(self, costs: TokenCosts) -> float:
        """Share of the MACs of these samples that does not arise."""
        whole = self.dense[:, None, None].expand_as(self.counts)
        return 1 - float(costs.totals(self.counts).double().mean() / costs.totals(whole).double().mean())

    def uninformative(self) -> list[int]:
        """Blocks whose scores do not tell tokens apart."""
        return [layer for layer, found in self.spreads.items() if found is not None and found < LEAST_SPREAD]


def first_samples(batches: Sequence[Batch], most: int) -> list[Batch]:
    """The first calibration samples, in their batches."""
    found, left = [], most
    for batch in batches:
        rows = min(left, len(next(iter(batch.values()))))
        if rows:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
        left -= rows
    if not found:
        raise InputError("data.calibration_batches=0: dropping tokens looks at calibration data; take at least 1")
    return found


@contextmanager
def listening(model: PrunableModel, keeping: Keeping, listener: Listener | None) -> Iterator[KeepingFlow]:
    """Drop tokens by a keeping, and show scores to a listener."""
    model.reduce_tokens(keeping)
    with watched_tokens(flow_of(model), listener) as flow:
        yield flow


def scores_at(model: PrunableModel, batches: Sequence[Batch], keeping: Keeping, layer: int) -> Tensor:
    """All scores of eligible tokens at one block, with earlier blocks already dropping, (N,)."""
    most = largest(batches)
    return restarted("token scores", most, lambda size: _scores_at(model, at_most(batches, size), keeping, layer))


@torch.inference_mode()
def _scores_at(model: PrunableModel, batches: Sequence[Batch], keeping: Keeping, layer: int) -> Tensor:
    found: list[Tensor] = []

    def listen(block: int, scores: Tensor, eligible: Tensor) -> None:
        if block == layer:
            found.append(scores[eligible].cpu())
            raise _Enough

    with listening(model, keeping, listen) as flow:
        for batch in followed("token scores", batches):
            try:
                model.logits(model.place(batch))
            except _Enough:
                flow.check()
    return torch.cat(found) if found else torch.empty(0)


def calibrated(
    model: PrunableModel,
    batches: Sequence[Batch],
    keeps: Sequence[float],
    keeping_of: Callable[[tuple[float, ...]], Keeping],
) -> Keeping:
    """Set the threshold of one block after the other to the quantile that keeps a share of its tokens.

    A block whose scores do not differ keeps all.

    Args:
        model: A copy that may be changed.
        batches: Calibration samples.
        keeps: Share of the eligible tokens entering each block that stays.
        keeping_of: The keeping with given thresholds, of a rule of the kind `Above`.
    """
    thresholds = [-torch.inf] * len(keeps)
    for step, keep in enumerate(keeps):
        keeping = keeping_of(tuple(thresholds))
        assert isinstance(keeping.rule, Above)
        scores = scores_at(model, batches, keeping, keeping.layers[step])
        if keep < 1 and len(scores) and spread(scores) >= LEAST_SPREAD:
            thresholds[step] = threshold_at(scores, keep, keeping.rule.strict)
    return keeping_of(tuple(thresholds))


def measured(model: PrunableModel, batches: Sequence[Batch], keeping: Keeping, scored: bool = True) -> Measured:
    """Run calibration samples through a model that drops tokens.

    Args:
        model: A copy that may be changed.
        batches: Calibration samples.
        keeping: What to drop.
        scored: Whether scores come from the data, so that their spread says something.
    """
    most = largest(batches)
    return restarted("token counts", most, lambda size: _measured(model, at_most(batches, size), keeping, scored))


@torch.inference_mode()
def _measured(model: PrunableModel, batches: Sequence[Batch], keeping: Keeping, scored: bool) -> Measured:
    seen: dict[int, list[Tensor]] = {layer: [] for layer in keeping.layers}

    def listen(block: int, scores: Tensor, eligible: Tensor) -> None:
        seen[block].append(scores[eligible].cpu())

    counts, dense = [], []
    with listening(model, keeping, listen if scored else None) as flow:
        for batch in followed("token counts", batches):
            model.logits(model.place(batch))
            flow.check()
            assert flow.seen is not None
            counts.append(flow.seen.counts.cpu())
            dense.append(flow.seen.entered.cpu())
    spreads = {layer: spread(torch.cat(s)) if s and sum(map(len, s)) > 1 else None for layer, s in seen.items()}
    return Measured(torch.cat(counts), torch.cat(dense), spreads)


def largest_keep(removed: Callable[[float], float], ratio: float, guess: float, least: float) -> float | None:
    """The largest share to keep that still removes a ratio, to a thousandth or so; None if none does.

    Args:
        removed: Share of the MACs that goes at a share to keep; falls, as good as always, with it.
        ratio: What has to go.
        guess: Where to begin.
        least: The smallest share worth keeping.
    """
    low, high, best = (least, None), (1.0, 0.0), None
    keep = min(max(guess, least), 1.0)
    for _ in range(TRIES):
        found = removed(keep)
        if found >= ratio:
            low, best = (keep, found), keep if best is None else max(keep, best)
            if found <= ratio + NEAR:
                break
        else:
            if keep <= least:
                return best
            high = (keep, found)
        keep = _between(low, high, ratio + NEAR / 2)
    return best


def _between(low: tuple[float, float | None], high: tuple[float, float], wanted: float) -> float:
    """Where a line through both ends meets what is wanted, well inside them; the low end where it is unknown."""
    (left, more), (right, less) = low, high
    if more is None:
        return left if right - left < 0.05 else max(left, right - 2 * (1 - right) - 0.05)
    part = (more - wanted) / (more - less) if more > less else 0.5
    return round(left + min(max(part, 0.1), 0.9) * (right - left), 5)
