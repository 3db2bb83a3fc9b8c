"""Timing several models against each other: warm-up until stable, then ABBA order.

One block runs A, B, B, A, so that a linear drift of clocks or of a shared machine's load
cancels in the ratio of the block. What the times say is in `evals/timing_statistics.py`.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evals.timing_statistics import P99_CALLS, Timings, interval_of, ratios_of, speedup, spread_ms
from utils.progress import Advance

__all__ = ["P99_CALLS", "Call", "Protocol", "Timings", "speedup", "spread_ms", "steps_of", "time_interleaved"]

Call = Callable[[], object]
Slots = tuple[list[float], list[float]]
STABLE = 0.05
MOST_WINDOWS = 20


def _quiet(note: str) -> None:
    """Tell no one."""


@dataclass(frozen=True)
class Protocol:
    """How long and in which order to time.

    Attributes:
        warmup: Calls before anything counts, at least; the first of them is reported by itself, and from four
            on there are more until two windows agree within 5%.
        blocks: ABBA blocks at least.
        seconds: Time to spend on each model at least.
        least_calls: Timed calls per model at least, however slow it is.
        most_calls: Timed calls per model at most, however fast it is.
        precision: Half width of the ratio's interval, relative, that further blocks must bring; None asks for none.
        longest: Seconds on each model at most for the sake of `precision`.
    """

    warmup: int = 10
    blocks: int = 5
    seconds: float = 1.0
    least_calls: int = 20
    most_calls: int = 1_000_000
    precision: float | None = None
    longest: float = 20.0


@dataclass(frozen=True)
class Warm:
    """How a call warmed up: its first time, its time now, how many calls that took, and whether it settled."""

    first_ms: float
    call_ms: float
    calls: int
    stable: bool


def time_interleaved(
    calls: Sequence[Call], device: torch.device, protocol: Protocol, advance: Advance = _quiet
) -> list[Timings]:
    """Time each call many times, all of them interleaved.

    Args:
        calls: One function a model; each runs one forward pass.
        device: Where they run; on CUDA the times are those of events on the stream.
        protocol: How long and in which order.
        advance: Told `steps_of(protocol, len(calls))` times, about, that a piece is done; never while a clock runs.
    """
    timed = _cuda_ms if device.type == "cuda" else _cpu_ms
    with torch.inference_mode():
        first = [timed(call, 1)[0] for call in calls]
        warm = []
        for call, ms in zip(calls, first, strict=True):
            warm.append(_warm_up(call, ms, timed, protocol))
            advance("warm-up")
        repeats = [_calls_per_slot(protocol, w.call_ms) for w in warm]
        timings = [Timings(w.first_ms, [], w.calls, w.stable) for w in warm]
        start = time.monotonic()
        while not _enough(timings, protocol, (time.monotonic() - start) / len(calls)):
            for timing, slots in zip(timings, _block(calls, repeats, timed, advance), strict=True):
                timing.blocks_ms.append(slots)
    return timings


def steps_of(protocol: Protocol, models: int) -> int:
    """How often `time_interleaved` says that a piece is done, for each warm-up and each slot.

    About the most where blocks are added for the sake of precision: nobody knows when that is reached.
    """
    blocks = protocol.blocks
    if protocol.precision is not None and models > 1:
        blocks = max(blocks, math.ceil(protocol.blocks * protocol.longest / protocol.seconds))
    return models * (1 + 2 * blocks)


def _block(
    calls: Sequence[Call], repeats: Sequence[int], timed: Callable[[Call, int], list[float]], advance: Advance
) -> list[Slots]:
    """One slot of each call in order, and one of each back again."""
    pairs = [*zip(calls, repeats, strict=True)]
    slots = []
    for call, n in [*pairs, *reversed(pairs)]:
        slots.append(timed(call, n))
        advance("")
    return [*zip(slots[: len(pairs)], reversed(slots[len(pairs) :]), strict=True)]


def _enough(timings: Sequence[Timings], protocol: Protocol, spent_s: float) -> bool:
    if len(timings[0].blocks_ms) < protocol.blocks:
        return False
    if protocol.precision is None or len(timings) < 2 or spent_s >= protocol.longest:
        return True
    return all(_half_width(timings[0], other) <= protocol.precision for other in timings[1:])


def _half_width(dense: Timings, other: Timings) -> float:
    found = interval_of(ratios_of(dense, other))
    return math.inf if found is None else (found[1] - found[0]) / 2


def _warm_up(call: Call, first_ms: float, timed: Callable[[Call, int], list[float]], protocol: Protocol) -> Warm:
    """Call until the medians of two windows in a row agree, for `seconds` or twenty windows at most."""
    window = max(1, protocol.warmup - 1)
    if protocol.warmup < 4:  # too few to compare
        return Warm(first_ms, statistics.median(timed(call, window)), 1 + window, True)
    window = math.ceil(window / 2)
    medians = [statistics.median(timed(call, window)) for _ in range(2)]
    deadline = time.monotonic() + protocol.seconds
    while not _alike(*medians[-2:]) and len(medians) < MOST_WINDOWS and time.monotonic() < deadline:
        medians.append(statistics.median(timed(call, window)))
    return Warm(first_ms, medians[-1], 1 + window * len(medians), _alike(*medians[-2:]))


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= STABLE * max(one, other)


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
