"""Windows of steady work under a meter: idle before and after, work until power is steady, models in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.meters import Meter, Reading
from utils.progress import progress_bar

Call = Callable[[], object]
# rounds that the time to settle is cut into, and how alike the power of two must be
ROUNDS, SETTLED = 8, 0.02


@dataclass(frozen=True)
class Window:
    """One stretch of steady work: what it took, how long, and how much was done."""

    reading: Reading
    seconds: float
    units: int


@dataclass(frozen=True)
class Idle:
    """Power of the idle machine in watts, models loaded: before all work, and after it, when the device is hot."""

    before: float
    after: float

    @property
    def watts(self) -> float:
        """What is taken off."""
        return (self.before + self.after) / 2

    @property
    def drift(self) -> float | None:
        """How far the two lie apart, relative to their mean; None where no power was seen."""
        return abs(self.after - self.before) / self.watts if self.watts > 0 else None


@dataclass
class Found:
    """All windows of one model, the idle machine around them, and whether power had settled before the first."""

    windows: list[Window] = field(default_factory=list)
    idle: Idle = Idle(0.0, 0.0)
    settled: bool = True


@dataclass(frozen=True)
class Lengths:
    """Seconds of a window, of an idle window, and of the work before the first window at most."""

    window: float
    idle: float
    settle: float


def take_turns(works: Sequence[Call], units: int, meter: Meter, lengths: Lengths, blocks: int) -> list[Found]:
    """Meter each work in windows, in the order A, B, B, A, between two windows in which nothing is done.

    Args:
        works: One function a model; each does a fixed piece of work.
        units: Samples or tokens of a piece.
        meter: What counts.
        lengths: Of the windows; they end with a whole piece.
        blocks: Rounds.
    """
    for work in works:
        work()
    found = [Found() for _ in works]
    turns = [*zip(works, found, strict=True)]
    turns = [*turns, *reversed(turns)] * blocks
    with progress_bar(f"energy by {meter.name}", 3 + len(turns), still=True) as advance:
        before = idle_power(meter, lengths.idle)
        advance("settling")
        settled = settle(works, meter, lengths)
        advance("")
        for work, mine in turns:
            mine.windows.append(window(work, units, meter, lengths.window))
            advance("")
        idle = Idle(before, idle_power(meter, lengths.idle))
        advance("")
    for mine in found:
        mine.idle, mine.settled = idle, settled
    return found


def idle_power(meter: Meter, seconds: float) -> float:
    """Watts of a machine on which nothing is done."""
    nothing = window(lambda: time.sleep(seconds), 1, meter, 0.0)
    return nothing.reading.joules / nothing.seconds


def settle(works: Sequence[Call], meter: Meter, lengths: Lengths) -> bool:
    """Work in rounds until two in a row take the same power within 2%; False if they never do in the time there is."""
    deadline, watts = time.monotonic() + lengths.settle, list[float]()
    while time.monotonic() < deadline:
        done = [window(work, 1, meter, lengths.settle / ROUNDS / len(works)) for work in works]
        watts.append(sum(w.reading.joules for w in done) / sum(w.seconds for w in done))
        if len(watts) > 1 and abs(watts[-1] - watts[-2]) <= SETTLED * max(watts[-2:]):
            return True
    return False


def idle_facts(run: Found) -> dict[str, Any]:
    """Joules a unit without the idle machine's share, its range by the two idle windows, and their watts."""

    def net(watts: float) -> float:
        return statistics.fmean((w.reading.joules - watts * w.seconds) / w.units for w in run.windows)

    idle = run.idle
    return {
        "idle_corrected": net(idle.watts), "idle_corrected_range": sorted((net(idle.before), net(idle.after))),
        "idle_watts": idle.watts, "idle_watts_before": idle.before, "idle_watts_after": idle.after,
        "idle_drift": idle.drift,
    }  # fmt: skip


def power_drift(windows: Sequence[Window]) -> float | None:
    """Relative change of power from the first half of the windows to the second; None for a single window."""
    half = len(windows) // 2
    if not half:
        return None
    first, last = (
        sum(w.reading.joules for w in part) / sum(w.seconds for w in part) for part in (windows[:half], windows[-half:])
    )
    return last / first - 1 if first > 0 else None


def window(work: Call, units: int, meter: Meter, seconds: float) -> Window:
    """Work for at least so many seconds, in whole pieces."""
    done = 0
    meter.start()
    start = time.monotonic()
    while True:
        work()
        done += units
        if time.monotonic() - start >= seconds:
            break
    spent = time.monotonic() - start
    return Window(meter.stop(), spent, done)
