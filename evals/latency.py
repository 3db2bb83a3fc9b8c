"""Latency: milliseconds of one forward pass on one batch, models interleaved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from evals.base import Measurement, Measurements, Subject
from evals.harness import Batches, Timed, batches_of, time_models
from evals.timing import Protocol
from evals.timing_statistics import LEAST_BLOCKS
from utils.rules import Count, Positive, Range, check_fields

Blocks = Annotated[int, Range(LEAST_BLOCKS)]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median time of the model alone on real validation samples already on the device, models interleaved (ABBA).

    Attributes:
        batch: Samples per pass; `auto`: the saturating batch.
        seconds: Time to spend on each model at least.
        warmup: Untimed passes first, at least; there are more until times are stable.
        blocks: ABBA blocks of the comparison at least.
        compile: Also time torch.compile, as `latency_compiled`; compiling comes before, as `compile_seconds`.
        isolate: Run each model in a fresh process; interleaving is lost, so that drift of the machine counts.
        precision: Half width of the speed-up's interval that further blocks must bring; null asks for none.
        largest: Batch at which the search for a saturating one ends.
    """

    batch: Count | Literal["auto"] = 1
    seconds: Positive = 1.0
    warmup: Count = 10
    blocks: Blocks = 5
    compile: bool = False
    isolate: bool = False
    precision: Positive | None = None
    largest: Count = 1024

    # what it can't measure of a model that is not on the device as a whole, with its unit
    resident_only: ClassVar[Mapping[str, str]] = {"latency": "ms"}

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Time all models against each other; the first one is the reference of `speedup`."""
        found: list[Measurements] = [{} for _ in subjects]
        for compiled in (False, True) if self.compile else (False,):
            batches = batches_of(self.batch, subjects, self.largest, compiled)
            timed = time_models(
                subjects, [batches.common] * len(subjects), self._protocol, compiled, self.isolate, "latency"
            )
            for number, (mine, run) in enumerate(zip(found, timed, strict=True)):
                mine["latency_compiled" if compiled else "latency"] = self._measured(run, batches, number, compiled)
        return found

    @property
    def _protocol(self) -> Protocol:
        return Protocol(self.warmup, self.blocks, self.seconds, precision=self.precision)

    def _measured(self, run: Timed, batches: Batches, number: int, compiled: bool) -> Measurement:
        details = batches.details(number) | {"compiled": compiled} | run.details
        if run.timings is None:
            return Measurement(None, "ms", run.reason, details)
        how = (
            "median over many forward passes of the model alone, "
            f"{'compiled' if compiled else 'eager'}, on samples already on the device; "
            f"{'each model in a process of its own, not interleaved' if self.isolate else 'interleaved (ABBA)'}"
        )
        return Measurement(run.median_ms, "ms", details=details, how=how, files={"raw.json": run.raw})
