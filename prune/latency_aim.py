"""Where to aim in a table of latencies, by what plans took that were aimed elsewhere.

A try is a mapping of `aim`, the share of the table's time that was asked for, and `share`, that of the clock.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Try = Mapping[str, Any]
LEAST_TRIES, APART = 3, 0.005


def next_aim(tried: Sequence[Try], wanted: float, least: float) -> float:
    """Share of the table's time to aim at: as most tries agree, else between two misses, else in proportion.

    Args:
        tried: At least one.
        wanted: Share of the time to reach.
        least: The smallest share that can be aimed at.
    """
    agreed = agreed_aim(tried, wanted)
    if agreed is not None and all(abs(agreed - t["aim"]) > APART for t in tried):
        aim = agreed
    elif len({t["share"] > wanted for t in tried}) == 2:
        aim = between(tried, wanted)
    else:
        aim = tried[-1]["aim"] * wanted / tried[-1]["share"]
    return min(1.0, max(least, aim))


def agreed_aim(tried: Sequence[Try], wanted: float) -> float | None:
    """The aim by the median over tries of time saved over time that the table promised: one wild time moves it little.

    None below three such tries, or where nothing was saved.
    """
    factors = [(1 - t["share"]) / (1 - t["aim"]) for t in tried if t["aim"] < 1]
    if len(factors) < LEAST_TRIES or (factor := statistics.median(factors)) <= 0:
        return None
    return 1 - (1 - wanted) / factor


def between(tried: Sequence[Try], wanted: float, part: float | None = None) -> float:
    """An aim between the least that took too long and the most that did not.

    Args:
        tried: Plans with their aims and shares.
        wanted: Share of the time to reach.
        part: How far up to go; None: where a straight line says, but a tenth of the way at least, since a restless
            clock may have put one of the two far off.
    """
    above = [t for t in tried if t["share"] > wanted]
    below = [t for t in tried if t["share"] <= wanted]
    if not above or not below:
        return tried[-1]["aim"]
    a, b = min(above, key=lambda t: t["aim"]), max(below, key=lambda t: t["aim"])
    line = (wanted - b["share"]) / max(a["share"] - b["share"], 1e-9)
    return b["aim"] + (a["aim"] - b["aim"]) * (min(0.9, max(0.1, line)) if part is None else part)
