"""What measured curves say of a budget: convex hulls, what each further unit costs, and the best shares.

A curve is the loss change of one part of a model against the fraction that it lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# how much steeper a curve is taken to be behind its last point, where nothing was measured
CLIFF = 10.0


@dataclass(frozen=True)
class Curve:
    """Loss changes at ascending fractions above 0.

    Attributes:
        ratios: Fractions removed.
        losses: Loss change at each; at 0 it is 0.
    """

    ratios: tuple[float, ...]
    losses: tuple[float, ...]

    def at(self, ratio: float) -> float:
        """The loss change between points, by straight lines; behind the last one, its own."""
        points = [(0.0, 0.0), *zip(self.ratios, self.losses, strict=True)]
        for (x0, y0), (x1, y1) in pairwise(points):
            if ratio <= x1:
                return y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
        return points[-1][1]

    def hull(self) -> "Curve":
        """The lower convex hull, from (0, 0) on."""
        kept: list[tuple[float, float]] = []
        for point in [(0.0, 0.0), *zip(self.ratios, self.losses, strict=True)]:
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], point):
                kept.pop()
            kept.append(point)
        ratios, losses = zip(*kept[1:], strict=True) if len(kept) > 1 else ((), ())
        return Curve(tuple(ratios), tuple(losses))

    def segments(self) -> list[tuple[float, float, float]]:
        """Start, end and slope of every straight piece."""
        points = [(0.0, 0.0), *zip(self.ratios, self.losses, strict=True)]
        return [(a[0], b[0], _slope(a, b)) for a, b in pairwise(points)]


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def marginals(curve: Curve, count: int) -> Tensor:
    """What each further unit of a group costs, in ascending order, from the hull of its curve.

    Behind the last measured fraction a unit is taken to cost `CLIFF` times as much as the dearest
    before it.

    Args:
        curve: Of the group.
        count: Units of the group.

    Returns:
        (count,), float64; entry j is the loss of losing the j-th lowest unit once the others before it are gone.
    """
    hull = curve.hull()
    end = hull.ratios[-1] if hull.ratios else 0.0
    dearest = max((abs(slope) for *_, slope in hull.segments()), default=1.0) or 1e-12

    def total(ratio: float) -> float:
        return hull.at(ratio) + max(0.0, ratio - end) * CLIFF * dearest

    steps = [total(j / count) for j in range(count + 1)]
    return torch.tensor([after - before for before, after in pairwise(steps)], dtype=torch.float64)


def best_shares(curves: Mapping[str, Curve], sizes: Mapping[str, int], ratio: float) -> dict[str, float] | None:
    """Minimise `sum E_l(s_l)` subject to `sum n_l s_l = ratio * sum n_l`.

    With E on its convex hull, `s_l(mu) = argmin_s E_l(s) - mu n_l s` takes every piece whose slope per
    weight is below mu; the mu that meets the budget is found by taking pieces in order of slope, the
    last one in part (equal slopes in the curves' order).

    Args:
        curves: E, by name.
        sizes: n, by name.
        ratio: Fraction of everything to remove.

    Returns:
        s, by name; None if the curves do not reach so far.
    """
    pieces = [
        (slope / sizes[name], order, start, end, name)
        for order, (name, curve) in enumerate(curves.items())
        for start, end, slope in curve.hull().segments()
    ]
    left = ratio * sum(sizes.values())
    shares = dict.fromkeys(sizes, 0.0)
    for _, _, start, end, name in sorted(pieces):
        if left <= 0:
            break
        room = (end - start) * sizes[name]
        taken = min(room, left)
        shares[name] = start + taken / sizes[name] if taken < room else end
        left -= taken
    return None if left > 1e-6 * max(sum(sizes.values()), 1) else shares


def spearman_of(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one side is constant or too short."""
    from scipy.stats import spearmanr

    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second)[0])  # type: ignore[arg-type]
