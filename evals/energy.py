"""Energy of inference: by a counter of the hardware where there is one; an estimate beside it, never in its place."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from data.base import DataBundle
from evals.base import Measurement, Measurements, Subject
from evals.compressed import ONLY_COMPRESSED, only_compressed
from evals.energy_windows import Call, Found, Lengths, idle_facts, power_drift, take_turns
from evals.meters import Meter, codecarbon, counters
from evals.prompts import batch_of_prompts, on_device, refuse_beyond_context, why_not_decodable
from evals.timing_statistics import interval_of
from models.base import PrunableModel
from models.decoding import Decoding, generate
from utils.errors import InputError
from utils.rules import Count, Positive, check_fields

HOW_CO2 = "what CodeCarbon makes of the estimated energy for the electricity of a country"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules per generated token at a fixed output length; per sample of a forward pass for other models.

    `energy` is measured: NVML's counter of the whole board on a GPU, RAPL's of the CPU packages elsewhere; null with
    the reason without a counter. `energy_estimated` is CodeCarbon's (rated power times load and time), `co2` what it
    makes of that for a country. Models take turns (A, B, B, A) in windows of steady work, which begin when the power of
    two rounds in a row agrees within 2% (a device that heats up takes more and more). Values are gross; the idle
    machine's power, measured with the models loaded before and after the work, is taken off in `idle_corrected`,
    with its range between the two. A model that differs from the dense one by zeros alone is not measured:
    compression only.

    Attributes:
        seconds: Length of a window at least; counters need 30 s or more.
        idle_seconds: Length of each of the two idle windows.
        settle_seconds: Work before the first window at most, until power is steady; None: as long as a window.
        blocks: Rounds of A, B, B, A.
        batch: Samples at a time.
        prompt_tokens: Length of every prompt.
        new_tokens: Tokens generated from each.
        country: Three letters (ISO 3166-1) for CO2; None: no CO2.
        estimate: Whether to ask CodeCarbon.
    """

    seconds: Positive = 30.0
    idle_seconds: Positive = 10.0
    settle_seconds: Positive | None = None
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
        lengths = Lengths(self.seconds, self.idle_seconds, self.settle_seconds or self.seconds)
        runs = iter(take_turns([w for w in works if w], units, meter, lengths, self.blocks))
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
        details: dict[str, Any] = {
            "status": meter.status, "meter": meter.name, **idle_facts(run), "settled": run.settled,
            "power_drift": power_drift(run.windows), "windows": len(each), "per_window": each,
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
            missing = "evals.energy.country is null: CO2 depends on whose electricity it is"
            return Measurement(None, name, missing, how=HOW_CO2)
        value = 1000 * sum(known) / sum(w.units for w in run.windows)
        details = {"status": "estimated", "country": self.country}
        return Measurement(value, name, details=details, how=HOW_CO2)


def _inferring(call: Call, device: torch.device) -> Call:
    """A call without gradients that returns when the device is done."""

    def run() -> None:
        with torch.inference_mode():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
