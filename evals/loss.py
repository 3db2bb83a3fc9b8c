"""Validation loss: the task's own, averaged over samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.base import Condensing, Particular
from evals.base import Measurement, Measurements, Subject


@dataclass(frozen=True)
class Loss:
    """Mean loss over the validation split, in nats for classification and, a token, for language modelling."""

    divides: ClassVar[bool] = True

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"loss": self._loss(subject)} for subject in subjects]

    def _loss(self, subject: Subject) -> Measurement:
        task = subject.data.task
        details = task.facts if isinstance(task, Particular) else {}
        if isinstance(task, Condensing):
            return Measurement(task.mean_loss(subject.predictions), "nat", details=details)
        total, count = 0.0, 0
        for logits, batch in subject.predictions:
            total += float(task.loss(logits, batch)) * len(logits)
            count += len(logits)
        return Measurement(total / count, getattr(task, "loss_unit", "nat"), details={**details, "samples": count})
