"""Accuracy: the share of validation samples whose largest logit is the label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.base import DataBundle, Scored
from evals.base import Measurement, Measurements, Subject
from evals.quality import measured
from models.base import PrunableModel
from utils.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """Fraction correct on the validation split, with its standard error and the chance level.

    Which samples are right is left beside the record, for paired comparisons (`python -m evals.paired`).
    """

    divides: ClassVar[bool] = True

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse a task that has other metrics.

        Raises:
            InputError: If it is not scored by accuracy.
        """
        if isinstance(data.task, Scored) and "accuracy" not in data.task.metrics:
            own = ", ".join(data.task.metrics)
            raise InputError(f"evals=accuracy: data={data.name} is scored by {own}; use evals=[quality]")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"accuracy": self._accuracy(subject)} for subject in subjects]

    def _accuracy(self, subject: Subject) -> Measurement:
        figures = subject.figures
        if "accuracy" in figures:
            return measured(figures["accuracy"], subject)
        own = ", ".join(figures)
        why = f"data={subject.data.name} is scored by {own}; evals=[quality] measures them"
        return Measurement(None, "fraction", reason=why)
