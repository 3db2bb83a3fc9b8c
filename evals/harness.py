"""What latency and throughput share: the calls that are timed, eager or compiled, at one batch or a saturating one."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from evals.base import Subject
from evals.comparable import refuse_incomparable
from evals.isolated import isolated_timings
from evals.saturation import Saturation, saturating_batch
from evals.timing import Call, Protocol, steps_of, time_interleaved
from evals.timing_statistics import Timings, comparison, interval_of, statistics_ms
from utils.memory import out_of_memory
from utils.progress import Advance, progress_bar

SEARCH = Protocol(warmup=3, blocks=1, seconds=0.1, least_calls=4)


@dataclass(frozen=True)
class Timed:
    """One model's times, or why there are none.

    Attributes:
        timings: The times.
        reason: Why there are none.
        details: Everything that a record keeps, but the raw times.
    """

    timings: Timings | None
    reason: str | None
    details: dict[str, Any]

    @property
    def median_ms(self) -> float | None:
        """Median time of a call."""
        return None if self.timings is None else statistics.median(self.timings.all_ms)

    @property
    def raw(self) -> bytes:
        """The raw times as JSON: per block the two slots, in milliseconds."""
        assert self.timings
        content = {"unit": "ms", "first_call": self.timings.first_ms, "blocks": self.timings.blocks_ms}
        return json.dumps(content).encode()


def time_models(
    subjects: Sequence[Subject],
    batches: Sequence[int],
    protocol: Protocol,
    compiled: bool = False,
    isolate: bool = False,
    title: str = "timing",
) -> list[Timed]:
    """Time all models against each other; one that does not fit or compile has a reason, at an unchanged batch.

    Args:
        subjects: The dense model first; it is the reference of all others.
        batches: Samples per pass of each model.
        protocol: How long and in which order.
        compiled: Whether to time torch.compile in the place of eager code.
        isolate: Whether each model runs in a fresh process of its own, one after the other.
        title: Label of the progress bar, which is drawn between timed pieces alone.
    """
    refuse_incomparable(subjects)
    steps = len(subjects) + (0 if isolate else steps_of(protocol, len(subjects)))
    with progress_bar(f"{title}, compiled" if compiled else title, steps, still=True) as advance:
        if isolate:
            runs = _in_processes(subjects, batches, protocol, compiled, advance)
        else:
            runs = _in_this_process(subjects, batches, protocol, compiled, advance)
    dense = runs[0] if isinstance(runs[0], Timings) else None
    return [_told(run, dense, isolate) for run in runs]


def _told(run: Timings | str, dense: Timings | None, isolate: bool) -> Timed:
    if isinstance(run, str):
        return Timed(None, run, {})
    details = statistics_ms(run)
    if dense is not None:
        details |= _apart(dense, run) if isolate else comparison(dense, run)
    return Timed(run, None, details | ({"isolated": True} if isolate else {}))


def _apart(dense: Timings, other: Timings) -> dict[str, Any]:
    """The speed-up of models that were not interleaved: blocks are no pairs, so each side is resampled by itself."""
    ours, theirs = ([sum(slots) for slots in t.slots_ms] for t in (dense, other))
    sides = interval_of(ours, seed=1), interval_of(theirs, seed=2)
    bounds = (sides[0][0] / sides[1][1], sides[0][1] / sides[1][0]) if sides[0] and sides[1] else None
    return {"speedup": statistics.median(ours) / statistics.median(theirs), "speedup_interval": bounds}


def _in_processes(
    subjects: Sequence[Subject], batches: Sequence[int], protocol: Protocol, compiled: bool, advance: Advance
) -> list[Timings | str]:
    runs = []
    for subject, batch in zip(subjects, batches, strict=True):
        runs.append(isolated_timings(subject, batch, protocol, compiled))
        advance("")
    return runs


def _in_this_process(
    subjects: Sequence[Subject], batches: Sequence[int], protocol: Protocol, compiled: bool, advance: Advance
) -> list[Timings | str]:
    if compiled:
        # what was compiled before counts towards a limit, above which code stays eager
        torch._dynamo.reset()
    ready = []
    for subject, batch in zip(subjects, batches, strict=True):
        ready.append(_ready(subject, batch, compiled))
        advance("first call")
    calls = [found.call for found in ready if not isinstance(found, str)]
    timings = iter(time_interleaved(calls, subjects[0].model.device, protocol, advance) if calls else [])
    return [r if isinstance(r, str) else replace(next(timings), compile_s=r.compile_s) for r in ready]


@dataclass(frozen=True)
class Ready:
    """A call to time, and the seconds that compiling it took."""

    call: Call
    compile_s: float | None


def _ready(subject: Subject, batch: int, compiled: bool) -> Ready | str:
    """The call to time; tried once where it may fail, so that a failure spoils no one else's times."""
    try:
        placed = subject.batch_of(batch)
        call = call_of(subject.model.logits, placed, compiled)
        if compiled:
            return Ready(call, compile_seconds(call))
        if subject.model.device.type == "cuda" or batch > 1:
            with torch.inference_mode():
                call()
        return Ready(call, None)
    except Exception as error:
        if out_of_memory(error):
            return f"out of memory at batch {batch}"
        if not compiled:
            raise
        return f"torch.compile failed: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"


@torch.inference_mode()
def compile_seconds(call: Call) -> float:
    """Compile a call by making it, and again; how much longer the first time took."""
    first, second = (_seconds(call) for _ in range(2))
    return max(0.0, first - second)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def call_of(logits: Callable[[Any], object], placed: Any, compiled: bool) -> Call:
    """One forward pass as a function without arguments."""
    if compiled:
        logits = torch.compile(logits, dynamic=False)
    return lambda: logits(placed)


@dataclass(frozen=True)
class Batches:
    """The batch that all models are timed at, and what its search found for each model.

    Attributes:
        common: The batch.
        searched: One search a model; empty where the batch was given.
    """

    common: int
    searched: tuple[Saturation, ...] = ()

    def details(self, number: int) -> dict[str, Any]:
        """What a record keeps for one of the models."""
        if not self.searched:
            return {"batch": self.common}
        own = self.searched[number]
        return {"batch": self.common, "own_batch": own.batch, "searched": own.to_json()}


def batches_of(setting: int | Literal["auto"], subjects: Sequence[Subject], largest: int, compiled: bool) -> Batches:
    """The batch as given, or (`auto`) the largest of the models' own saturating batches."""
    if setting != "auto":
        return Batches(setting)
    with progress_bar("saturating batch", len(subjects) * largest.bit_length(), still=True) as advance:

        def rate(batch: int, subject: Subject) -> float | None:
            found = _rate(subject, batch, compiled)
            advance(f"batch {batch}")
            return found

        found = tuple(saturating_batch(partial(rate, subject=subject), largest) for subject in subjects)
    return Batches(max(search.batch for search in found), found)


def _rate(subject: Subject, batch: int, compiled: bool) -> float | None:
    """Samples per second of the quickest call, which other work on the machine disturbed least."""
    (run,) = _in_this_process([subject], [batch], SEARCH, compiled, lambda note: None)
    return None if isinstance(run, str) else batch * 1000 / min(run.all_ms)
