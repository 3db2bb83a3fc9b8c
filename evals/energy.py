"""Energy of inference: by a counter of the hardware where there is one; an estimate beside it, never in its place."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from data.base import DataBundle
from evals.base import Measurement, Measurements, Subject
from evals.compressed import ONLY_COMPRESSED, only_compressed
from evals.meters import Meter, Reading, codecarbon, counters
from evals.prompts import batch_of_prompts, on_device, refuse_beyond_context, why_not_decodable
from evals.timing_statistics import interval_of
from models.base import PrunableModel
from models.decoding import Decoding, generate
from utils.errors import InputError
from utils.rules import Count, Positive, check_fields

Call = Callable[[], object]


@dataclass(frozen=True)
class Window:
    """One stretch of steady work: what it took, how long, and how much was done."""

    reading: Reading
    seconds: float
    units: int


@dataclass
class Found:
    """All windows of one model, and the power of the idle machine in watts."""

    windows: list[Window] = field(default_factory=list)
    idle_watts: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules per generated token at a fixed output length; per sample of a forward pass for other models.

    `energy` is measured: NVML's counter of the whole board on a GPU, RAPL's of the CPU packages elsewhere; null with
    the reason without a counter. `energy_estimated` is CodeCarbon's (rated power times load and time), `co2` what it
    makes of that for a country. Models take turns (A, B, B, A) in windows of steady work. Values are gross; the
    idle machine's power, measured with the models loaded, is taken off in `idle_corrected`. A model that
    differs from the dense one by zeros alone is not measured: compression only.

    Attributes:
        seconds: Length of a window at least; counters need 30 s or more.
        idle_seconds: Length of the idle window.
        blocks: Rounds of A, B, B, A.
        batch: Samples at a time.
        prompt_tokens: Length of every prompt.
        new_tokens: Tokens generated from each.
        country: Three letters (ISO 3166-1) for CO2; None: no CO2.
        estimate: Whether to ask CodeCarbon.
    """

    seconds: Positive = 30.0
    idle_seconds: Positive = 10.0
    blocks: Count = 2
    batch: Count = 1
    prompt_tokens: Count = 64
    new_tokens: Count = 32
    country: str | None = None
    estimate: bool = True

    resident_only: ClassVar[Mapping[str, str]] = {"energy": "J/token"}

    def __post_init__(self) -> None:
        check_fields(self)
        if self.country is not None and not (
            len(self.country) == 3 and self.country.isalpha() and self.country.isupper()
        ):
            raise InputError(
                f"evals.energy.country={self.country}: must be three capital letters (ISO 3166-1), or null"
            )

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse, before any work, a prompt that leaves no room for the new tokens (InputError)."""
        if why_not_decodable(model, data) is None:
            refuse_beyond_context(model, "evals.energy.prompt_tokens", self.prompt_tokens, self.new_tokens)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure all models in turns."""
        dense = subjects[0]
        decodes = why_not_decodable(dense.model, dense.data) is None
        unit = "token" if decodes else "sample"
        counter, missing = counters(dense.model.device)
        found = [{"energy": Measurement(None, f"J/{unit}", "; ".join(missing.values()))} for _ in subjects]
        if counter is not None:
            found = self._by(counter, subjects, decodes, unit)
        if self.estimate:
            estimated = self._estimated(subjects, decodes, unit)
            found = [{**mine, **more} for mine, more in zip(found, estimated, strict=True)]
        return found

    def _estimated(self, subjects: Sequence[Subject], decodes: bool, unit: str) -> list[Measurements]:
        meter = codecarbon(self.country)
        if isinstance(meter, str):
            nothing = {"energy_estimated": f"J/{unit}", "co2": f"kg/1000 {unit}s"}
            return [{name: Measurement(None, of, meter) for name, of in nothing.items()} for _ in subjects]
        return self._by(meter, subjects, decodes, unit)

    def _by(self, meter: Meter, subjects: Sequence[Subject], decodes: bool, unit: str) -> list[Measurements]:
        """What one meter finds for each subject."""
        name = "energy" if meter.status == "measured" else "energy_estimated"
        works = [
            None if only_compressed(s.model, subjects[0].model) else self._work(s, subjects[0].data, decodes)
            for s in subjects
        ]
        units = self.batch * (self.new_tokens if decodes else 1)
        runs = iter(take_turns([w for w in works if w], units, meter, self.seconds, self.idle_seconds, self.blocks))
        found: list[Measurements] = []
        for work in works:
            if work is None:
                found.append({name: Measurement(None, f"J/{unit}", ONLY_COMPRESSED)})
                continue
            run = next(runs)
            found.append({name: self._joules(run, meter, unit)})
            if meter.status == "estimated":
                found[-1]["co2"] = self._co2(run, unit)
        return found

    def _work(self, subject: Subject, data: DataBundle, decodes: bool) -> Call:
        model = subject.model
        if not decodes:
            return _inferring(partial(model.logits, subject.batch_of(self.batch)), model.device)
        assert isinstance(model, Decoding)
        prompts = on_device(model, batch_of_prompts(data, self.batch, self.prompt_tokens))
        return _inferring(partial(generate, model, prompts, self.new_tokens), model.device)

    def _joules(self, run: Found, meter: Meter, unit: str) -> Measurement:
        if problems := [w.reading.problem for w in run.windows if w.reading.problem]:
            return Measurement(None, f"J/{unit}", problems[0])
        each = [w.reading.joules / w.units for w in run.windows]
        net = [(w.reading.joules - run.idle_watts * w.seconds) / w.units for w in run.windows]
        details: dict[str, Any] = {
            "status": meter.status, "meter": meter.name, "idle_corrected": statistics.fmean(net),
            "idle_watts": run.idle_watts, "windows": len(each), "per_window": each,
            "std": statistics.stdev(each) if len(each) > 1 else None, "interval": interval_of(each),
            "seconds": sum(w.seconds for w in run.windows), "units": sum(w.units for w in run.windows),
            "watts": sum(w.reading.joules for w in run.windows) / sum(w.seconds for w in run.windows),
            "batch": self.batch,
        }  # fmt: skip
        if unit == "token":
            details |= {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        return Measurement(statistics.fmean(each), f"J/{unit}", details=details)

    def _co2(self, run: Found, unit: str) -> Measurement:
        name = f"kg/1000 {unit}s"
        grams = [w.reading.kg for w in run.windows]
        known = [kg for kg in grams if kg is not None]
        if len(known) < len(grams):
            return Measurement(None, name, "evals.energy.country is null: CO2 depends on whose electricity it is")
        value = 1000 * sum(known) / sum(w.units for w in run.windows)
        return Measurement(value, name, details={"status": "estimated", "country": self.country})


def _inferring(call: Call, device: torch.device) -> Call:
    """A call without gradients that returns when the device is done."""

    def run() -> None:
        with torch.inference_mode():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def take_turns(
    works: Sequence[Call], units: int, meter: Meter, seconds: float, idle_seconds: float, blocks: int
) -> list[Found]:
    """Meter each work in windows, in the order A, B, B, A.

    Args:
        works: One function a model; each does a fixed piece of work.
        units: Samples or tokens of a piece.
        meter: What counts.
        seconds: Length of a window at least; it ends with a whole piece.
        idle_seconds: Length of the idle window, before all others.
        blocks: Rounds.
    """
    for work in works:
        work()
    idle = window(lambda: time.sleep(idle_seconds), 1, meter, 0.0)
    found = [Found(idle_watts=idle.reading.joules / idle.seconds) for _ in works]
    pairs = [*zip(works, found, strict=True)]
    for _ in range(blocks):
        for work, mine in [*pairs, *reversed(pairs)]:
            mine.windows.append(window(work, units, meter, seconds))
    return found


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
