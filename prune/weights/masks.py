"""Which weights go: exact counts within a comparison group, or n of every m.

Scores are float32, higher means keep; masks are bool, True means removed. Of equal scores the
one with the lowest index goes first. Shapes: O outputs (rows), I inputs (columns).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import floor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prune.weights.words import WORDS, word_ranks
from utils.errors import InputError, RunError

Group = Literal["tensor", "row", "column"]
Share = float | Fraction
UNSTRUCTURED = "unstructured"
# up to here, comparing the entries of a group with each other is faster than selecting
PAIRWISE = 16
# groups at a time that fit into a CPU's cache
CHUNK = 1 << 16
# scores at a time that fit into it; a multiple of every group that has a word
WORD_CHUNK = 1 << 17


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
    if count == 0 or scores.shape[1] == count or not len(scores):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    limit = _kth(scores, count)
    if scores.device.type != "cpu":  # a look at the counts would wait for the device
        return _first_of_ties(scores, limit, count)
    mask = scores <= limit
    if int(torch.count_nonzero(mask)) == count * len(mask):  # no ties at any limit
        return mask
    crowded = mask.sum(dim=1) > count
    mask[crowded] = _first_of_ties(scores[crowded], limit[crowded], count)
    return mask


def _first_of_ties(scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """What lies below each row's limit, and so many of those at it that there are `count`, the first ones."""
    below, equal = scores < limit, scores == limit
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))


def _kth(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of every row, (rows, 1)."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    # numpy selects ten times as fast as torch on a CPU
    found = np.partition(scores.detach().numpy(), count - 1, axis=1)[:, count - 1 : count]
    return torch.from_numpy(found.copy())


def grouped_mask(scores: Tensor, share: Share, group: Group) -> Tensor:
    """Remove `floor(share * m)` of the m entries of every comparison group.

    A share that is a `Fraction` tells exactly how many entries of the matrix go: what rounding down in
    each group leaves is taken one by one from the first groups, all of which are of one size.

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
        return _lowest_in_all(scores.T.contiguous(), share).T.contiguous()
    flat = scores if group == "row" else scores.reshape(1, -1)  # (O, I) -> (1, O*I)
    return _lowest_in_all(flat, share).view_as(scores)


def _lowest_in_all(groups: Tensor, share: Share) -> Tensor:
    """The lowest of every group, (groups, size); as many as the share says."""
    total = removed_in(share, *groups.shape)
    each, extra = divmod(total, max(len(groups), 1))
    if not extra:
        return lowest(groups, each)
    return torch.cat([lowest(groups[:extra], each + 1), lowest(groups[extra:], each)])


def removed_in(share: Share, groups: int, size: int) -> int:
    """Entries that go from groups of one size, all together."""
    return removed_count(share, groups * size) if isinstance(share, Fraction) else groups * removed_count(share, size)


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
    groups = scores.reshape(-1, pattern.of)  # (O, I) -> (O * I/m, m)
    if scores.device.type != "cpu":
        refuse_non_finite(scores)
        return lowest_few(groups.T, pattern.zeros).T.reshape(scores.shape)  # (m, O * I/m) -> (O, I)
    if pattern.of in WORDS and len(groups):
        return _word_mask(scores.reshape(-1), pattern).view_as(scores)
    mask = torch.empty_like(groups, dtype=torch.bool)
    for part, found in zip(groups.split(CHUNK), mask.split(CHUNK), strict=True):
        places = torch.stack(part.unbind(1))  # (m, groups)
        refuse_non_finite(places)
        np.stack(lowest_few(places, pattern.zeros).numpy(), axis=1, out=found.numpy())  # type: ignore[arg-type]
    return mask.view_as(scores)


def _word_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """`pattern_mask` on a CPU for groups that have a word, of scores in one row, (groups * m,)."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    # numpy compares several times as fast as torch on a CPU
    for part, found in zip(scores.split(WORD_CHUNK), mask.split(WORD_CHUNK), strict=True):
        values = part.detach().numpy()
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            refuse_non_finite(scores)
        np.less(word_ranks(values, pattern.of), pattern.zeros, out=found.numpy())
    return mask


def lowest_few(places: Tensor, count: int) -> Tensor:
    """The same as `lowest` for many short rows that stand upright, (size, rows)."""
    if len(places) > PAIRWISE:
        return lowest(places.T.contiguous(), count).T
    if places.device.type != "cpu":
        return _ranked(places) < count
    mask = places <= nth_lowest(places, count)
    if int(torch.count_nonzero(mask)) != count * mask.shape[1]:  # ties at some limit
        crowded = mask.sum(dim=0) > count
        mask[:, crowded] = _ranked(places[:, crowded]) < count
    return mask


def nth_lowest(places: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of every column of (size, rows), (rows,): a sorting network, as far as it matters."""
    values = list(places.unbind(0))
    for low, high, smaller, larger in comparators(len(values), count - 1):
        first, second = values[low], values[high]
        if smaller:
            values[low] = torch.minimum(first, second)
        if larger:
            values[high] = torch.maximum(first, second)
    return values[count - 1]


@cache
def comparators(size: int, wanted: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """The part of Batcher's odd-even merge sort that one place of the sorted row depends on.

    K. E. Batcher, Sorting networks and their applications, 1968; rows are thought of as filled up to a
    power of two with what is larger than all, which no comparison moves.

    Args:
        size: Length of a row.
        wanted: The place.

    Returns:
        Places to compare, the lower first, and whether the smaller and the larger of them are needed.
    """
    full = 1 << (size - 1).bit_length()
    pairs = [
        (start + i, start + i + step)
        for merged in _powers_below(full)
        for step in reversed(_powers_below(2 * merged))
        for start in range(step % merged, full - step, 2 * step)
        for i in range(step)
        if start + i + step < size and (start + i) // (2 * merged) == (start + i + step) // (2 * merged)
    ]
    needed, kept = {wanted}, []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def _powers_below(limit: int) -> list[int]:
    """1, 2, 4, … below a limit."""
    return [1 << power for power in range((limit - 1).bit_length())]


def _ranked(places: Tensor) -> Tensor:
    """How many entries of a column of (size, rows) go before each one, uint8: every pair is compared."""
    rank = torch.zeros_like(places, dtype=torch.uint8)  # the arithmetic may wrap on its way
    for place in range(len(places) - 1):
        first = (places[place] <= places[place + 1 :]).view(torch.uint8)
        rank[place + 1 :] += first
        rank[place] += len(first)
        for row in first:
            rank[place] -= row
    return rank


def refuse_non_finite(values: Tensor, what: str = "scores") -> None:
    """Raise a RunError if a value is NaN or infinite; one look at the device."""
    if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise RunError(f"{what}: {bad} of {values.numel()} are NaN or infinite; all must be finite")


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
    """Eight entries of a mask a byte, (ceil(entries / 8),), uint8, in main memory."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpacked(packed_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `packed`, in main memory."""
    entries = torch.Size(shape).numel()
    bits = np.unpackbits(packed_mask.cpu().numpy(), count=entries, bitorder="little")
    return torch.from_numpy(bits).view(shape).bool()
