"""From token scores to a schedule: which positions go, layer by layer, until the MACs do (OPTIN's Tau, clean rule).

Only the counts matter at run time, where tokens are merged; a position that goes at a layer is
gone from all later ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.merging import Reduction, mergeable


def walked(
    scores: Tensor, protected: int, least: int, macs: Callable[[Sequence[int]], int], limit: int
) -> tuple[list[int], bool]:
    """Clear (layer, position) entries, least important first, until the MACs are within a limit.

    An entry stays if a layer would fall below the floor, or lose more tokens at once than can be
    paired; it is tried again once others have gone.

    Args:
        scores: Higher means keep, (L, T); layer 0 keeps all.
        protected: Positions in front that stay.
        least: Tokens kept at least in every layer.
        macs: MACs for given token counts per layer.
        limit: Most of them that may be left.

    Returns:
        Tokens left in each layer, and whether the limit was met.
    """
    layers, tokens = scores.shape
    state = _Nested(layers, tokens, protected, least)
    order = scores[1:, protected:].flatten().argsort(stable=True).tolist()
    entries = [(1 + at // (tokens - protected), protected + at % (tokens - protected)) for at in order]
    met = macs(state.counts) <= limit
    while not met and entries:
        left = []
        for at, entry in enumerate(entries):
            if not state.clear(*entry):
                left.append(entry)
            elif met := macs(state.counts) <= limit:
                left += entries[at + 1 :]
                break
        if len(left) == len(entries):
            break
        entries = left
    return state.counts, met


def fewest(layers: int, tokens: int, protected: int, least: int) -> list[int]:
    """The least tokens that a walk can leave in each layer."""
    counts = [tokens]
    for _ in range(layers - 1):
        counts.append(max(min(least, counts[-1]), counts[-1] - mergeable(counts[-1], protected)))
    return counts


def schedule_of(counts: Sequence[int]) -> Reduction:
    """Merge so many tokens before the attention of each layer that these are left."""
    return Reduction((0, *(before - after for before, after in zip(counts, counts[1:], strict=False))), "attention")


class _Nested:
    """Which layer each position goes at, and how many are left in each."""

    def __init__(self, layers: int, tokens: int, protected: int, least: int) -> None:
        self.counts = [tokens] * layers
        self.gone_at = torch.full((tokens,), layers).tolist()
        self.protected, self.least = protected, least

    def clear(self, layer: int, position: int) -> bool:
        """Let a position go at a layer; False where a rule forbids it. One gone already costs nothing."""
        until = self.gone_at[position]
        if until <= layer:
            return True
        counts = [count - (layer <= at < until) for at, count in enumerate(self.counts)]
        steps = zip(counts, counts[1:], strict=False)
        if min(counts) < self.least or any(n - m > mergeable(n, self.protected) for n, m in steps):
            return False
        self.counts, self.gone_at[position] = counts, layer
        return True
