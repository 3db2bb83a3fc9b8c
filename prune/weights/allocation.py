"""How much each matrix loses, so that all together lose exactly what was asked for.

Shapes: L matrices or blocks.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from prune.weights.masks import kth_lowest, refuse_non_finite, removed_count
from utils.errors import InputError

HIGHEST = 0.99


def global_counts(scores: Sequence[Tensor], ratio: float) -> list[int]:
    """Entries of each matrix that fall below one threshold for all of them.

    Args:
        scores: Non-negative, float32, of any shape, on a common scale.
        ratio: Fraction of all entries.

    Returns:
        One count a matrix; they sum to `floor(ratio * entries)`. Ties at the threshold go in order.
    """
    for values in scores:
        refuse_non_finite(values)
    total = removed_count(ratio, sum(values.numel() for values in scores))
    if total == 0:
        return [0] * len(scores)
    limit = kth_lowest(scores, total)
    counts = [int(torch.count_nonzero(values < limit)) for values in scores]
    missing = total - sum(counts)
    for number, values in enumerate(scores):
        extra = min(missing, int(torch.count_nonzero(values == limit)))
        counts[number], missing = counts[number] + extra, missing - extra
    return counts


def outlier_share(scores: Sequence[Tensor], multiple: float) -> float:
    """Share of a block's scores, all its matrices together, above `multiple` times their mean."""
    entries = sum(values.numel() for values in scores)
    mean = sum(float(values.double().sum()) for values in scores) / entries
    return sum(int(torch.count_nonzero(values > multiple * mean)) for values in scores) / entries


def owl(outliers: Sequence[float], sizes: Sequence[int], ratio: float, spread: float) -> list[float]:
    """Blocks with more outliers lose less (OWL: Yin et al., ICML 2024, arXiv:2310.05175).

    With `d = 2 spread (D - min D) / (max D - min D)` the density is `d - mean(d) + 1 - ratio`; the
    mean weighs blocks by size, so that the ratio is met whatever their sizes.

    Args:
        outliers: D, one a block.
        sizes: Weights in each block.
        ratio: Fraction of all weights to remove.
        spread: Largest deviation of the density, lambda.

    Returns:
        Sparsity of each block.
    """
    lowest, highest = min(outliers), max(outliers)
    scale = 2 * spread / (highest - lowest) if highest > lowest else 0.0
    return met([ratio - scale * (value - lowest) for value in outliers], sizes, ratio)


def tail_exponent(weight: Tensor) -> float:
    """Hill estimate `1 + m / sum ln(e_i / e_min)` over the upper half of a matrix's squared singular values."""
    values = torch.linalg.svdvals(weight.float()).square().sort().values
    tail = values[len(values) // 2 :].double()
    spread = float((tail / tail[0].clamp_min(1e-30)).log().sum())
    return 1 + len(tail) / max(spread, 1e-12)


def alpha(exponents: Sequence[float], sizes: Sequence[int], ratio: float, epsilon: float) -> list[float]:
    """Blocks with a lighter tail lose more (AlphaPruning: Lu et al., NeurIPS 2024, arXiv:2410.10912).

    `q = 1 - epsilon + 2 epsilon (a - min a) / (max a - min a)`, and the sparsity is
    `q * ratio * sum(n) / sum(n q)`.

    Args:
        exponents: a, one a block.
        sizes: Weights in each block, n.
        ratio: Fraction of all weights to remove.
        epsilon: Largest relative deviation.

    Returns:
        Sparsity of each block.
    """
    lowest, highest = min(exponents), max(exponents)
    scale = 2 * epsilon / (highest - lowest) if highest > lowest else 0.0
    weights = [1 - epsilon + scale * (value - lowest) if scale else 1.0 for value in exponents]
    mean = sum(n * q for n, q in zip(sizes, weights, strict=True)) / sum(sizes)
    return met([q * ratio / mean for q in weights], sizes, ratio)


def met(wanted: Sequence[float], sizes: Sequence[int], ratio: float, highest: float = HIGHEST) -> list[float]:
    """Shift sparsities by one constant and clip them to [0, highest], so that their weighted mean is the ratio.

    Raises:
        InputError: If the ratio is above what every block may lose.
    """
    if ratio > highest:
        raise InputError(f"prune.ratio={ratio}: must be at most {highest} where blocks lose different parts")
    low, high = -2.0 - max(wanted), 2.0 - min(wanted)

    def shifted(by: float) -> list[float]:
        return [min(max(value + by, 0.0), highest) for value in wanted]

    for _ in range(100):
        middle = (low + high) / 2
        mean = sum(n * s for n, s in zip(sizes, shifted(middle), strict=True)) / sum(sizes)
        low, high = (middle, high) if mean < ratio else (low, middle)
    return shifted(high)


def whole_counts(shares: Sequence[float], sizes: Sequence[int], ratio: float) -> list[int]:
    """Entries that go from each matrix: as the shares say, and `floor(ratio * entries)` in all.

    What rounding down leaves goes to those that it took most from, the first of equals.
    """
    total = removed_count(ratio, sum(sizes))
    exact = [Fraction(share) * size for share, size in zip(shares, sizes, strict=True)]
    counts = [floor(value) for value in exact]
    missing = total - sum(counts)
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order if missing > 0 else order[::-1]:
        if missing == 0:
            break
        step = 1 if missing > 0 else -1
        if 0 <= counts[i] + step <= sizes[i]:
            counts[i], missing = counts[i] + step, missing - step
    return counts
