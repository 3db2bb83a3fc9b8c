"""One threshold over the scores of many tensors: exact counts, stable ties, floors a tensor."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from prune.weights.masks import refuse_non_finite


def asked_count(ratio: float, total: int) -> int:
    """`round(ratio * total)` without the rounding of a binary product."""
    return round(Fraction(str(ratio)) * total)


def lowest_of_all(scores: Sequence[Tensor], count: int, floors: Sequence[int] | None = None) -> list[Tensor]:
    """Mark exactly `count` of the lowest entries of all tensors together.

    Of equal scores the one in the earlier tensor goes first, then the one of lower index. A
    tensor keeps as many as its floor says; the next lowest of the others go instead.

    Args:
        scores: Of any shape, float32.
        count: Entries that go.
        floors: Entries that each tensor keeps at least.

    Returns:
        Masks of the same shapes, bool; True goes.

    Raises:
        RunError: If a score is NaN or infinite.
        ValueError: If floors and count contradict each other.
    """
    for values in scores:
        refuse_non_finite(values)
    sizes = [values.numel() for values in scores]
    least = [min(floor, size) for floor, size in zip(floors or [0] * len(sizes), sizes, strict=True)]
    if not 0 <= count <= sum(sizes) - sum(least):
        raise ValueError(f"count is {count}; must be between 0 and {sum(sizes) - sum(least)}, what the floors leave")
    free = [~_last(values.flatten(), floor) for values, floor in zip(scores, least, strict=True)]
    pool = torch.cat([values.flatten()[may] for values, may in zip(scores, free, strict=True)])
    gone, masks, start = _lowest(pool, count), [], 0
    for values, may in zip(scores, free, strict=True):
        mask = torch.zeros(values.numel(), dtype=torch.bool)
        taken = int(may.sum())
        mask[may] = gone[start : start + taken]
        masks.append(mask.view(values.shape))
        start += taken
    return masks


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the lowest entries of one tensor; of equal ones the lower index."""
    return _lowest(values.flatten(), count).view(values.shape)


def _lowest(values: Tensor, count: int) -> Tensor:
    """The same for (N,); sorts nothing."""
    if count == 0 or count == len(values):
        return torch.full((len(values),), count > 0)
    limit = float(np.partition(values.numpy(), count - 1)[count - 1])
    gone, ties = values < limit, values == limit
    missing = count - int(gone.sum())
    return gone | (ties & (ties.cumsum(0) <= missing))


def _last(values: Tensor, count: int) -> Tensor:
    """Mark the `count` entries of (N,) that would go last."""
    return ~_lowest(values, len(values) - count)
