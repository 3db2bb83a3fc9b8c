"""Validation loss: the task's own, averaged over samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from evals.base import Measurement, Measurements, Subject


@dataclass(frozen=True)
class Loss:
    """Mean loss over the validation split, in nats for classification."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"loss": self._loss(subject)} for subject in subjects]

    def _loss(self, subject: Subject) -> Measurement:
        total, count = 0.0, 0
        for logits, batch in subject.predictions:
            total += float(subject.data.task.loss(logits, batch)) * len(logits)
            count += len(logits)
        return Measurement(total / count, getattr(subject.data.task, "loss_unit", "nat"), details={"samples": count})
