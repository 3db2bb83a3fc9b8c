"""Which tokens stay, by their scores: pure functions on (B, T), per sample, the same in any batch.

Equal scores go by the lower position. Tokens that are not eligible are never chosen and never counted.

Shapes: B samples, T tokens, K points at most.
"""

from fractions import Fraction

import torch
from torch import Tensor


def share_of(keep: float, count: int) -> int:
    """`ceil(keep * count)`, exactly: 0.7 is seven tenths, not the nearest double."""
    above, below = _as_typed(keep)
    return -(-count * above // below)  # in whole numbers: torch's compiler knows the count as a symbol


def shares_of(keep: float, counts: Tensor) -> Tensor:
    """The same for many counts, int64."""
    above, below = _as_typed(keep)
    return -(-counts * above // below)


@torch.compiler.assume_constant_result
def _as_typed(keep: float) -> tuple[int, int]:
    return Fraction(str(keep)).as_integer_ratio()


def ranks(scores: Tensor, eligible: Tensor) -> Tensor:
    """Places of the tokens from the highest score down, from 0: (B, T) int64."""
    order = scores.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def top_k(scores: Tensor, eligible: Tensor, k: Tensor | int) -> Tensor:
    """The k highest of each sample, (B, T) bool; `k` is one number or (B, 1)."""
    return (ranks(scores, eligible) < k) & eligible


def above(scores: Tensor, eligible: Tensor, threshold: float, strict: bool, least: int) -> Tensor:
    """Those above a threshold (or on it, if not strict), and the highest others up to `least`: (B, T) bool."""
    over = scores > threshold if strict else scores >= threshold
    return (over & eligible) | top_k(scores, eligible, least)


def threshold_at(scores: Tensor, keep: float, strict: bool) -> float:
    """The constant above (or from) which a share of scores lies; minus infinity keeps all.

    Args:
        scores: All that the share is of, (N,).
        keep: The share, in (0, 1]; rounded up to whole scores.
        strict: Whether a score on the threshold goes.
    """
    gone = len(scores) - share_of(keep, len(scores))
    if gone <= 0:
        return -torch.inf
    return float(scores.sort().values[gone - 1 if strict else gone])


def spread(scores: Tensor) -> float:
    """How far the middle nine tenths of scores lie apart, as a fraction of their median's size."""
    ordered = scores.double().sort().values
    low, middle, high = (ordered[round(at * (len(ordered) - 1))] for at in (0.05, 0.5, 0.95))
    return float((high - low) / middle.abs().clamp_min(torch.finfo(torch.float32).tiny))


def sampled(scores: Tensor, eligible: Tensor, k: Tensor, most: int) -> Tensor:
    """Adaptive token sampling: evenly spaced points through the inverse of the scores' distribution function.

    Fayyaz et al., Adaptive Token Sampling (ECCV 2022, arXiv:2111.15667), section 3.2. Scores are sorted and
    summed up, the sums scaled to [0, 1], and for each of k points between the smallest sum above 0 and 1 the
    nearest token is taken; one taken twice counts once.

    Args:
        scores: Not negative, (B, T).
        eligible: What may be taken, (B, T) bool.
        k: Points of each sample, (B, 1) int64; more of them than tokens leave few tokens out.
        most: No sample has more points.

    Returns:
        (B, T) bool, at most k of a sample.
    """
    counts = eligible.sum(1, keepdim=True)
    order = scores.masked_fill(~eligible, torch.inf).argsort(dim=1, stable=True)  # others go last
    sums = _distribution(scores.masked_fill(~eligible, 0).double().gather(1, order), counts)  # (B, T)
    start = sums.masked_fill(sums <= 0, torch.inf).min(dim=1, keepdim=True).values.clamp_max(1)
    steps = torch.arange(most, device=scores.device).expand(len(scores), -1)
    # the last of k points is 1, also where there is one only
    points = 1 - (1 - start) * (k - 1 - steps) / (k - 1).clamp_min(1)  # (B, T), of which k count
    right = torch.searchsorted(sums, points.contiguous()).clamp_max(counts - 1).clamp_min(0)
    left = (right - 1).clamp_min(0)
    nearer = (points - sums.gather(1, left)) <= (sums.gather(1, right) - points)
    found = order.gather(1, torch.where(nearer, left, right))
    hits = torch.zeros_like(order).scatter_add_(1, found, (steps < k).long())
    return (hits > 0) & eligible


def _distribution(ordered: Tensor, counts: Tensor) -> Tensor:
    """Cumulative sums of ascending scores from 0 to 1, (B, T); beyond a sample's own they stay at 1."""
    index = torch.arange(ordered.shape[1], device=ordered.device)
    inside = index < counts
    sums = ordered.cumsum(1)
    first, last = sums[:, :1], sums[:, -1:]
    even = index / (counts - 1).clamp_min(1)
    scaled = torch.where(last > first, (sums - first) / (last - first).clamp_min(1e-300), even)
    return torch.where(inside, scaled, 1.0).clamp_max(1.0)
