"""Throughput: samples per second at a batch that keeps the device busy, models interleaved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from evals.base import Measurement, Measurements, Subject
from evals.end_to_end import end_to_end
from evals.harness import Batches, Timed, batches_of, time_models
from evals.latency import Blocks
from evals.timing import Protocol
from utils.rules import Count, Positive, check_fields


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Samples per second of the model alone on real validation samples, the same batch for all, interleaved (ABBA).

    Attributes:
        batch: Samples per pass; the same for every model. `auto`: the largest of their saturating batches, found by
            doubling until two doublings in a row gain less than 5%; each model's own is measured as well.
        seconds: Time to spend on each model at least.
        warmup: Untimed passes first, at least; there are more until times are stable.
        blocks: ABBA blocks of the comparison at least.
        compile: Also time torch.compile, as `throughput_compiled`.
        isolate: Run each model in a fresh process; interleaving is lost, so that drift of the machine counts.
        precision: Half width of the speed-up's interval that further blocks must bring; null asks for none.
        largest: Batch at which the search for a saturating one ends.
        end_to_end: Also measure it with loading, transforms and transfer of the samples, as `throughput_end_to_end`.
    """

    batch: Count | Literal["auto"] = 64
    seconds: Positive = 1.0
    warmup: Count = 5
    blocks: Blocks = 5
    compile: bool = False
    isolate: bool = False
    precision: Positive | None = None
    largest: Count = 1024
    end_to_end: bool = True

    # what it can't measure of a model that is not on the device as a whole, with its unit
    resident_only: ClassVar[Mapping[str, str]] = {"throughput": "samples/s", "throughput_end_to_end": "samples/s"}

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Time all models against each other; the first one is the reference of `speedup`."""
        found: list[Measurements] = [{} for _ in subjects]
        for compiled in (False, True) if self.compile else (False,):
            batches = batches_of(self.batch, subjects, self.largest, compiled)
            timed = self._time(subjects, [batches.common] * len(subjects), compiled)
            own = self._at_own(subjects, batches, compiled)
            for number, (mine, run, best) in enumerate(zip(found, timed, own, strict=True)):
                name = "throughput_compiled" if compiled else "throughput"
                mine[name] = self._measured(run, batches, number, {"compiled": compiled, **best})
        if self.end_to_end:
            whole = end_to_end(subjects, self.seconds / 2)
            found = [mine | {"throughput_end_to_end": more} for mine, more in zip(found, whole, strict=True)]
        return found

    def _time(self, subjects: Sequence[Subject], batches: Sequence[int], compiled: bool) -> list[Timed]:
        protocol = Protocol(self.warmup, self.blocks, self.seconds, precision=self.precision)
        return time_models(subjects, batches, protocol, compiled, self.isolate, "throughput")

    def _at_own(self, subjects: Sequence[Subject], batches: Batches, compiled: bool) -> list[dict[str, Any]]:
        """Each model at its own best batch, where these differ."""
        sizes = [search.batch for search in batches.searched]
        if len(set(sizes)) < 2:
            return [{} for _ in subjects]
        runs = self._time(subjects, sizes, compiled)
        rates = [
            None if run.median_ms is None else n * 1000 / run.median_ms for run, n in zip(runs, sizes, strict=True)
        ]
        return [
            {"at_own_batch": {"batch": n, "samples_per_s": rate, "reason": run.reason, **_gain(rates[0], rate)}}
            for run, n, rate in zip(runs, sizes, rates, strict=True)
        ]

    def _measured(self, run: Timed, batches: Batches, number: int, more: dict[str, Any]) -> Measurement:
        details = batches.details(number) | more
        if run.median_ms is None:
            return Measurement(None, "samples/s", run.reason, details)
        kept = ("n", "cv", "blocks", "warmup_calls", "warmup_stable", "isolated", "status", "compile_seconds")
        of_times = {
            name: value for name, value in run.details.items() if name in kept or "speedup" in name or "itself" in name
        }
        how = (
            f"{batches.common} samples over the median time of a forward pass of the model alone; "
            f"{'each model in a process of its own, not interleaved' if self.isolate else 'interleaved (ABBA)'}"
        )
        rate = batches.common * 1000 / run.median_ms
        return Measurement(rate, "samples/s", details=details | of_times, how=how, files={"raw.json": run.raw})


def _gain(dense: float | None, other: float | None) -> dict[str, float]:
    return {"speedup": other / dense} if dense and other else {}
