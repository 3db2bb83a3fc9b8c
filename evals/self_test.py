"""The harness against itself: two copies of one model must come out equal, or no comparison can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.base import Measurement, Measurements, Metric, Subject
from utils.errors import InputError, RunError
from utils.rules import Count, Positive, check_fields


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Runs metrics on two copies of one model: times within the tolerance of each other, everything else equal.

    Attributes:
        timed: Metrics whose speed-up must be 1 within the tolerance.
        equal: Metrics whose values must be the same for both.
        tolerance: Largest distance of a speed-up from 1.
        attempts: How often a timed metric may be measured until it is met; the record says how often it was.
    """

    timed: Mapping[str, Any]
    equal: Mapping[str, Any]
    tolerance: Positive = 0.02
    attempts: Count = 3

    def __post_init__(self) -> None:
        check_fields(self)
        if odd := [name for name, m in {**self.timed, **self.equal}.items() if not hasattr(m, "measure")]:
            raise InputError(f"evals.self_test: {odd[0]} must be a metric, a mapping with a _target_")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure the first and the last model.

        Raises:
            InputError: If there is one model alone, or two different ones.
            RunError: If figures differ that must not.
        """
        first, last = subjects[0], subjects[-1]
        if first.model is last.model:
            raise InputError("evals.self_test: needs two copies of one model; use +experiment=self_test")
        if first.model.fingerprint() != last.model.fingerprint():
            raise InputError("evals.self_test: the two models differ; it compares a model with itself (prune=copy)")
        found: list[Measurements] = [{}, {}]
        for metric in self.equal.values():
            self._add(metric, [first, last], found)
        tries = 0
        for metric in self.timed.values():
            tries = max(tries, self._until_equal(metric, [first, last], found))
        problems = unequal(found[0], found[1], self.tolerance)
        if problems:
            raise RunError(
                "evals.self_test: two copies of one model came out different: " + "; ".join(problems)
                + ". The machine is too restless, or the harness is wrong: no speed-up from here can be trusted"
            )  # fmt: skip
        gains = [m.details["speedup"] for m in found[1].values() if "speedup" in m.details]
        worst = max((abs(gain - 1) for gain in gains), default=0.0)
        for mine in found:
            mine["self_test"] = Measurement(
                worst, "distance from 1", details={"tolerance": self.tolerance, "attempts": tries}
            )
        return [found[0]] * (len(subjects) - 1) + [found[1]]

    def _until_equal(self, metric: Metric, pair: Sequence[Subject], found: list[Measurements]) -> int:
        """Measure a timed metric again and again until it is met; how often that took."""
        for attempt in range(1, self.attempts + 1):
            self._add(metric, pair, found)
            if not unequal(found[0], found[1], self.tolerance):
                return attempt
        return self.attempts

    def _add(self, metric: Metric, pair: Sequence[Subject], found: list[Measurements]) -> None:
        from evals.evaluate import described

        for mine, more in zip(found, metric.measure(pair), strict=True):
            mine |= described(more, metric)


def unequal(first: Measurements, second: Measurements, tolerance: float) -> list[str]:
    """What differs between two copies of one model, in words: speed-ups by more than the tolerance, values at all."""
    problems = []
    for name, found in second.items():
        gain = found.details.get("speedup")
        if gain is not None and abs(gain - 1) > tolerance:
            bounds = found.details.get("speedup_interval")
            interval = f", 95% interval {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
            problems.append(f"{name} is {gain:.3f}x as fast{interval}; it must be 1.00 within {tolerance:.0%}")
        if gain is None and found.value != first[name].value:
            problems.append(f"{name} is {first[name].value} and {found.value}; it must be the same")
    return problems
