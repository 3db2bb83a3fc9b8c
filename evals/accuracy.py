"""Accuracy: the share of validation samples whose largest logit is the label."""

from collections.abc import Sequence
from dataclasses import dataclass

from evals.base import Measurement, Measurements, Subject
from evals.quality import measured


@dataclass(frozen=True)
class Accuracy:
    """Fraction correct on the validation split, with its standard error and the chance level."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"accuracy": self._accuracy(subject)} for subject in subjects]

    def _accuracy(self, subject: Subject) -> Measurement:
        figures = subject.figures
        if "accuracy" in figures:
            return measured(figures["accuracy"])
        own = ", ".join(figures)
        why = f"data={subject.data.name} is scored by {own}; evals=[quality] measures them"
        return Measurement(None, "fraction", reason=why)
