"""What raw times say: percentiles, spread, the ratio of two models, and how sure it is.

Iterations of one slot depend on each other, so intervals resample whole blocks.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

P99_CALLS = 1000
LEAST_BLOCKS = 3
VARIES = 0.03
EQUAL = 0.02
DRAWS = 2000


@dataclass(frozen=True)
class Timings:
    """Times of one model in milliseconds.

    Attributes:
        first_ms: Its very first call.
        blocks_ms: Per block the calls of its two slots.
        warmup_calls: Calls before anything counted, the first one included.
        stable: Whether its times had settled by then.
        compile_s: Seconds that compiling it took, before all of these; None for eager code.
    """

    first_ms: float
    blocks_ms: list[tuple[list[float], list[float]]]
    warmup_calls: int = 0
    stable: bool = True
    compile_s: float | None = None

    @property
    def all_ms(self) -> list[float]:
        """All timed calls."""
        return [t for slots in self.blocks_ms for slot in slots for t in slot]

    @property
    def slots_ms(self) -> list[tuple[float, float]]:
        """Per block the medians of its two slots."""
        return [(statistics.median(a), statistics.median(b)) for a, b in self.blocks_ms]


def ratios_of(dense: Timings, pruned: Timings) -> list[float]:
    """Per block `(A1 + A2) / (B1 + B2)` on the medians of the slots: how many times faster."""
    pairs = zip(dense.slots_ms, pruned.slots_ms, strict=True)
    return [sum(a) / sum(b) for a, b in pairs]


def speedup(dense: Timings, pruned: Timings) -> float:
    """How many times faster: the median over blocks of `(A1 + A2) / (B1 + B2)` on slot medians."""
    return statistics.median(ratios_of(dense, pruned))


def interval_of(ratios: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Bootstrap interval of the median of block ratios; None below three blocks.

    Args:
        ratios: One ratio a block.
        level: Share of resampled medians inside.
        seed: Of the resampling.
    """
    if len(ratios) < LEAST_BLOCKS:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(ratios), (DRAWS, len(ratios)))  # (draws, blocks)
    low, high = np.percentile(np.median(drawn, axis=1), (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)


def ratios_to_itself(timing: Timings) -> list[float]:
    """Ratios of one model to itself, from pairs of neighbouring blocks.

    Its four slots there lie at the times 0, 3, 4 and 7, so that `(A0 + A7) / (A3 + A4)` is free of linear drift too.
    """
    return [(a0 + a7) / (a3 + a4) for (a0, a3), (a4, a7) in pairwise(timing.slots_ms)]


def spread_ms(times: Sequence[float]) -> dict[str, float | int | None]:
    """p10, p90, p99, mean, std and n of raw times; p99 is None below 1,000 calls."""
    p10, p90, p99 = (float(p) for p in np.percentile(times, (10, 90, 99)))
    return {
        "p10": p10,
        "p90": p90,
        "p99": p99 if len(times) >= P99_CALLS else None,
        "mean": statistics.fmean(times),
        "std": statistics.stdev(times) if len(times) > 1 else None,
        "n": len(times),
    }


def variation(times: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation over mean; None for a single time."""
    return statistics.stdev(times) / statistics.fmean(times) if len(times) > 1 else None


def statistics_ms(timing: Timings) -> dict[str, Any]:
    """Everything that a record keeps of one model's times, but the raw ones."""
    times = timing.all_ms
    p50, p95 = (float(p) for p in np.percentile(times, (50, 95)))
    return {
        "p50": p50,
        "p95": p95,
        **spread_ms(times),
        "cv": variation(times),
        "blocks": len(timing.blocks_ms),
        "first_call": timing.first_ms,
        "warmup_calls": timing.warmup_calls,
        "warmup_stable": timing.stable,
        **({} if timing.compile_s is None else {"compile_seconds": timing.compile_s}),
    }


def comparison(dense: Timings, other: Timings) -> dict[str, Any]:
    """The speed-up over the dense model with its interval, and the dense model against itself.

    `status` is `unreliable` where the dense model does not come out as fast as itself within 2%.
    """
    itself = ratios_to_itself(dense)
    aa = statistics.median(itself) if itself else None
    trusted = aa is None or abs(aa - 1) <= EQUAL
    return {
        "speedup": speedup(dense, other),
        "speedup_interval": interval_of(ratios_of(dense, other)),
        "dense_against_itself": aa,
        "dense_against_itself_interval": interval_of(itself),
        **({} if trusted else {"status": "unreliable"}),
    }
