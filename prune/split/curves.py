"""The split of a ratio between units and tokens that two curves promise to move the answers least: pure functions."""

from bisect import bisect_left
from collections.abc import Sequence
from math import inf, sqrt

# (ratio, divergence), by ascending ratio
Points = Sequence[tuple[float, float]]
# how finely the ratio that units take is chosen
STEP = 0.01
# a promise is taken up only if it is better than that of one kind alone by this part
DOUBT = 0.1


def splits(units: Points, tokens: Points, ratio: float) -> list[float]:
    """Ratios that units alone may remove, the rest being for tokens; the most promising first.

    What is left is the product of what each leaves, and the divergences of both add up. Tokens alone, or units alone,
    are taken where nothing promises to be clearly better.

    Args:
        units: What units do, at some ratios.
        tokens: What tokens do; a ratio beyond the last is out of reach.
        ratio: To be removed in all.
    """
    steps = [n * STEP for n in range(int(ratio / STEP) + 1)]
    shares = [*(share for share in steps if share < ratio), ratio]

    def promise(share: float) -> float:
        both = 1.0 if share in (0.0, ratio) else 1 / (1 - DOUBT)
        return both * (promised(units, share) + _of_tokens(tokens, 1 - (1 - ratio) / (1 - share)))

    return sorted(shares, key=promise)


def _of_tokens(tokens: Points, ratio: float) -> float:
    if ratio <= 1e-9:
        return 0.0
    return promised(tokens, ratio) if tokens and ratio <= tokens[-1][0] + 1e-9 else inf


def promised(points: Points, ratio: float) -> float:
    """A curve at a ratio: its root is a line between points, from 0 at 0, and goes on straight behind the last."""
    if ratio <= 0:
        return 0.0
    if not points:
        return inf
    known = [(0.0, 0.0), *((at, sqrt(max(value, 0.0))) for at, value in points)]
    right = min(max(bisect_left([at for at, _ in known], ratio), 1), len(known) - 1)
    (x0, y0), (x1, y1) = known[right - 1], known[right]
    return max(y0 + (y1 - y0) * (ratio - x0) / (x1 - x0), 0.0) ** 2
