"""Timing several models against each other: warm-up, then ABBA order.

One block runs A, B, B, A, so that a linear drift of clocks or of a shared machine's load
cancels in the ratio of the block.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
P99_CALLS = 1000


@dataclass(frozen=True)
class Protocol:
    """How long and in which order to time.

    Attributes:
        warmup: Calls before anything counts, the first of them reported by itself.
        blocks: ABBA blocks.
        seconds: Time to spend on each model, about.
        least_calls: Timed calls per model at least, however slow it is.
        most_calls: Timed calls per model at most, however fast it is.
    """

    warmup: int = 10
    blocks: int = 5
    seconds: float = 1.0
    least_calls: int = 20
    most_calls: int = 2000


@dataclass(frozen=True)
class Timings:
    """Times of one model in milliseconds.

    Attributes:
        first_ms: Its very first call.
        blocks_ms: Per block the calls of its two slots.
    """

    first_ms: float
    blocks_ms: list[tuple[list[float], list[float]]]

    @property
    def all_ms(self) -> list[float]:
        """All timed calls."""
        return [t for slots in self.blocks_ms for slot in slots for t in slot]


def time_interleaved(calls: Sequence[Call], device: torch.device, protocol: Protocol) -> list[Timings]:
    """Time each call many times, all of them interleaved.

    Args:
        calls: One function a model; each runs one forward pass.
        device: Where they run; on CUDA the times are those of events on the stream.
        protocol: How long and in which order.
    """
    timed = _cuda_ms if device.type == "cuda" else _cpu_ms
    with torch.inference_mode():
        first = [timed(call, 1)[0] for call in calls]
        warm = [statistics.median(timed(call, max(1, protocol.warmup - 1))) for call in calls]
        repeats = [_calls_per_slot(protocol, ms) for ms in warm]
        blocks: list[list[tuple[list[float], list[float]]]] = [[] for _ in calls]
        for _ in range(protocol.blocks):
            there = [timed(call, n) for call, n in zip(calls, repeats, strict=True)]
            back = [timed(call, n) for call, n in reversed([*zip(calls, repeats, strict=True)])]
            for mine, slots in zip(blocks, zip(there, reversed(back), strict=True), strict=True):
                mine.append(slots)
    return [Timings(ms, mine) for ms, mine in zip(first, blocks, strict=True)]


def _calls_per_slot(protocol: Protocol, call_ms: float) -> int:
    wanted = protocol.seconds * 1000 / max(call_ms, 1e-6)
    total = min(max(wanted, protocol.least_calls), protocol.most_calls)
    return math.ceil(total / (2 * protocol.blocks))


def _cpu_ms(call: Call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


def _cuda_ms(call: Call, repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True)]


def speedup(dense: Timings, pruned: Timings) -> float:
    """How many times faster: the median over blocks of `(A1 + A2) / (B1 + B2)` on slot medians."""
    pairs = zip(dense.blocks_ms, pruned.blocks_ms, strict=True)
    return statistics.median(sum(map(statistics.median, a)) / sum(map(statistics.median, b)) for a, b in pairs)


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
