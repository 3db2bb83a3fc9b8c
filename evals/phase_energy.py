"""Joules of a run's phases: by a counter of the hardware, or where there is none, and it was asked for, by an estimate.

A phase that is done from storage takes the joules of fetching, as its seconds are those of fetching.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from evals.meters import Meter, Reading, codecarbon, counters
from utils.launched import launched

Joules = Literal["counters", "estimate"]
# a counter may stand still over so short a time
RESOLVED_S = 0.2


@dataclass
class PhaseEnergy:
    """What meters the phases of one run, one after the other.

    Attributes:
        meter: What counts; None where nothing does, or not yet.
        reason: Why nothing counts.
        readings: Per phase what went, one entry a time that it ran.
    """

    meter: Meter | None = None
    reason: str = "it was over before the device was known"
    readings: dict[str, list[Reading]] = field(default_factory=dict)

    def begin(self, device: torch.device, joules: Joules) -> None:
        """Find what counts on a device.

        Args:
            device: Where the run computes.
            joules: Whether CodeCarbon may estimate what no counter measures.
        """
        self.meter, missing = counters(device)
        self.reason = "; ".join(missing.values())
        if self.meter is not None and device.type == "cuda" and launched() is not None:
            self.meter, self.reason = None, "NVML counts one GPU, and this run has several processes"
        if self.meter is None and joules == "estimate":
            found = codecarbon(None)
            self.meter, self.reason = (None, f"{self.reason}; {found}") if isinstance(found, str) else (found, "")
        elif self.meter is None:
            self.reason += "; joules=estimate asks CodeCarbon"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Meter a block; a meter that fails costs its figure and nothing else."""
        meter = self.meter
        if meter is None:
            yield
            return
        start, failed = time.monotonic(), _started(meter)
        try:
            yield
        finally:
            reading, spent = failed or _stopped(meter), time.monotonic() - start
            if reading.joules <= 0 and spent < RESOLVED_S:  # never so where the meter failed: those are NaN
                reading = Reading(0.0)
            self.readings.setdefault(name, []).append(reading)

    def to_json(self, phases: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Per phase the joules with their status, or null with the reason."""
        return {name: self._of(name) for name in phases}

    def in_words(self, phases: Sequence[str]) -> list[str]:
        """One sentence with the figures that are known; none where none is."""
        known = {name: figure for name, figure in self.to_json(phases).items() if figure["value"] is not None}
        if not known or self.meter is None:
            return []
        each = ", ".join(f"{name} {figure['value']:.3g}" for name, figure in known.items())
        return [f"Joules ({self.meter.status}, {self.meter.name}): {each}."]

    def _of(self, name: str) -> dict[str, Any]:
        found = self.readings.get(name)
        if self.meter is None or not found:
            reason = self.reason if self.meter is None else "it did not run, or began before the device was known"
            return {"value": None, "unit": "J", "status": "null", "reason": reason}
        if problems := [reading.problem for reading in found if reading.problem]:
            return {"value": None, "unit": "J", "status": "null", "reason": problems[0]}
        joules = sum(reading.joules for reading in found)
        if joules <= 0:
            return {"value": None, "unit": "J", "status": "null", "reason": f"too short for {self.meter.name}"}
        return {"value": joules, "unit": "J", "status": self.meter.status, "meter": self.meter.name}


def _started(meter: Meter) -> Reading | None:
    """Start a meter; where it fails, the reading that says so."""
    try:
        meter.start()
    except Exception as error:  # counters fail in as many ways as they have drivers
        return Reading(math.nan, problem=f"{meter.name} failed: {type(error).__name__}: {error}")
    return None


def _stopped(meter: Meter) -> Reading:
    """Stop a meter; where it fails, a reading that says so."""
    try:
        return meter.stop()
    except Exception as error:  # as above
        return Reading(math.nan, problem=f"{meter.name} failed: {type(error).__name__}: {error}")
