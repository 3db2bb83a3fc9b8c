"""Which weights go: exact counts within a comparison group, or n of every m.

Scores are float32, higher means keep; masks are bool, True means removed. Of equal scores the
one with the lowest index goes first. Shapes: O outputs (rows), I inputs (columns).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from utils.errors import InputError, RunError

Group = Literal["tensor", "row", "column"]
Share = float | Fraction
UNSTRUCTURED = "unstructured"
# up to here, comparing all pairs of a group is faster than selecting
PAIRWISE = 16
# groups at a time that fit into a CPU's cache
CHUNK = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """`zeros` of every `of` consecutive inputs of a row are zero."""

    zeros: int
    of: int

    @property
    def share(self) -> Fraction:
        """Fraction of the weights that is zero."""
        return Fraction(self.zeros, self.of)

    def refuse_misfit(self, name: str, inputs: int) -> None:
        """Raise an InputError if a matrix's inputs can't be divided into groups."""
        if inputs % self.of:
            raise InputError(
                f"prune.pattern={self.zeros}:{self.of}: {name} has {inputs} inputs, which must be a multiple of "
                f"{self.of}; leave it out by prune.skip"
            )


def pattern_of(text: str, ratio: float) -> Pattern | None:
    """Read `2:4` and its like, n zeros in every m; None for `unstructured`.

    Raises:
        InputError: If it is no pattern, or asks for another ratio.
    """
    if text == UNSTRUCTURED:
        return None
    left, colon, right = text.partition(":")
    if not (colon and left.isdecimal() and right.isdecimal() and 0 < int(left) < int(right)):
        raise InputError(
            f"prune.pattern={text}: must be unstructured, or n:m with 0 < n < m (n zeros in every m inputs)"
        )
    pattern = Pattern(int(left), int(right))
    share = float(pattern.share)
    if abs(ratio - share) > 1e-9:
        raise InputError(
            f"prune.ratio={ratio}: contradicts prune.pattern={text}, which removes {share:g}; must be {share:g}"
        )
    return pattern


def removed_count(share: Share, size: int) -> int:
    """Entries that go out of `size`: `floor(share * size + 1e-9)`, so that 0.29 of 100 are 29."""
    return floor(share * size) if isinstance(share, Fraction) else floor(share * size + 1e-9)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest scores in every row; ties go to the lowest index.

    Args:
        scores: (rows, size).
        count: Between 0 and size.

    Returns:
        (rows, size), bool.
    """
    if count == 0 or scores.shape[1] == count:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    limit = _kth(scores, count)
    mask = scores <= limit
    if int(torch.count_nonzero(mask)) == count * len(mask):  # no ties at any limit
        return mask
    below, equal = scores < limit, scores == limit
    missing = count - below.sum(dim=1, keepdim=True)
    crowded = (equal.sum(dim=1, keepdim=True) > missing).flatten()
    ties = equal[crowded]
    equal[crowded] = ties & (ties.cumsum(dim=1, dtype=torch.int32) <= missing[crowded])
    return below | equal


def _kth(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of every row, (rows, 1)."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    # numpy selects ten times as fast as torch on a CPU
    found = np.partition(scores.detach().numpy(), count - 1, axis=1)[:, count - 1 : count]
    return torch.from_numpy(found.copy())


def grouped_mask(scores: Tensor, share: Share, group: Group) -> Tensor:
    """Remove `floor(share * m)` of the m entries of every comparison group.

    Args:
        scores: (O, I).
        share: Fraction to remove, in [0, 1].
        group: What competes: the whole `tensor`, a `row` (an output) or a `column` (an input).

    Returns:
        (O, I), bool.

    Raises:
        RunError: If a score is NaN or infinite.
    """
    refuse_non_finite(scores)
    if group == "column":
        return lowest(scores.T.contiguous(), removed_count(share, scores.shape[0])).T.contiguous()
    flat = scores if group == "row" else scores.reshape(1, -1)  # (O, I) -> (1, O*I)
    return lowest(flat, removed_count(share, flat.shape[1])).view_as(scores)


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Remove the lowest `zeros` of every `of` consecutive inputs.

    Args:
        scores: (O, I); I must be a multiple of `pattern.of`.
        pattern: How many of how many.

    Returns:
        (O, I), bool.

    Raises:
        RunError: If a score is NaN or infinite.
    """
    refuse_non_finite(scores)
    groups = scores.reshape(-1, pattern.of)  # (O, I) -> (O * I/m, m)
    if pattern.of > PAIRWISE:
        return lowest(groups, pattern.zeros).view_as(scores)
    chunk = CHUNK if scores.device.type == "cpu" else max(len(groups), 1)
    return torch.cat([_lowest_few(part, pattern.zeros) for part in groups.split(chunk)]).view_as(scores)


def _lowest_few(groups: Tensor, count: int) -> Tensor:
    """The same as `lowest` for short rows, (rows, size): every pair is compared."""
    places = torch.stack(groups.unbind(1))  # (size, rows)
    rank = torch.zeros_like(places, dtype=torch.uint8)  # how many go before; the arithmetic may wrap on its way
    for place in range(len(places) - 1):
        first = (places[place] <= places[place + 1 :]).view(torch.uint8)
        rank[place + 1 :] += first
        rank[place] += len(first)
        for row in first:
            rank[place] -= row
    return torch.stack((rank < count).unbind(0), dim=1)  # (size, rows) -> (rows, size)


def refuse_non_finite(scores: Tensor) -> None:
    """Raise a RunError if a score is NaN or infinite."""
    if scores.numel() and not all(map(isfinite, map(float, scores.aminmax()))):
        bad = int((~torch.isfinite(scores)).sum())
        raise RunError(f"scores: {bad} of {scores.numel()} are NaN or infinite; every score must be finite")


def kth_lowest(parts: Sequence[Tensor], count: int) -> float:
    """The `count`-th lowest of non-negative scores that lie in several tensors.

    Bisects their bits, which are ordered like the numbers, so that nothing is copied or sorted.

    Args:
        parts: Non-negative float32 tensors of any shape.
        count: From 1 to the number of all entries.
    """
    bits = [part.view(torch.int32) for part in parts]
    low, high = 0, int(torch.tensor(torch.inf).view(torch.int32))
    while low < high:
        middle = (low + high) // 2
        enough = sum(int(torch.count_nonzero(part <= middle)) for part in bits) >= count
        low, high = (low, middle) if enough else (middle + 1, high)
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


def packed(mask: Tensor) -> Tensor:
    """Eight entries of a mask a byte, (ceil(entries / 8),), uint8."""
    flat = mask.flatten()
    padded = pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpacked(packed_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `packed`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_mask.device)
    bits = (packed_mask[:, None] >> places) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape).bool()
