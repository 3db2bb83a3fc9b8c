"""Latency: milliseconds of one forward pass on one batch, models interleaved."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from evals.base import Measurement, Measurements, Subject
from evals.timing import Protocol, speedup, spread_ms, time_interleaved
from utils.rules import Count, Positive, check_fields


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median latency of the model alone, eager, on real validation samples.

    Attributes:
        batch: Samples per pass.
        seconds: Time to spend on each model, about.
        warmup: Untimed passes first.
        blocks: ABBA blocks of the comparison.
    """

    batch: Count = 1
    seconds: Positive = 1.0
    warmup: Count = 10
    blocks: Count = 5

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Time all models against each other; the first one is the reference of `speedup`."""
        protocol = Protocol(warmup=self.warmup, blocks=self.blocks, seconds=self.seconds)
        calls = [partial(s.model.logits, s.batch_of(self.batch)) for s in subjects]
        timings = time_interleaved(calls, subjects[0].model.device, protocol)
        return [
            {
                "latency": Measurement(
                    statistics.median(timing.all_ms),
                    "ms",
                    details={
                        **spread_ms(timing.all_ms),
                        "batch": self.batch,
                        "first_call": timing.first_ms,
                        "speedup": speedup(timings[0], timing),
                    },
                )
            }
            for timing in timings
        ]
