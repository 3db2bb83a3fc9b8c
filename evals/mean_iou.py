"""Mean IoU: how well predicted and labelled regions of a class cover each other, averaged over the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.base import DataBundle, Scored
from evals.base import Measurement, Measurements, Subject
from evals.quality import measured
from models.base import PrunableModel
from utils.errors import InputError


@dataclass(frozen=True)
class MeanIoU:
    """Intersection over union of pixels, summed over the validation split, averaged over the classes that occur.

    Predictions are resized to each label's own size; ignored pixels count nowhere. The IoU of each class is in
    `per_class`, None where neither a label nor a prediction has it; such classes are left out of the mean.
    """

    divides: ClassVar[bool] = True

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse a task that has other metrics.

        Raises:
            InputError: If it is not scored by mean IoU.
        """
        if not isinstance(data.task, Scored) or "mean_iou" not in data.task.metrics:
            own = ", ".join(data.task.metrics) if isinstance(data.task, Scored) else "metrics of its own"
            raise InputError(f"evals=mean_iou: data={data.name} is scored by {own}; use evals=[quality]")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"mean_iou": self._mean_iou(subject)} for subject in subjects]

    def _mean_iou(self, subject: Subject) -> Measurement:
        if (figure := subject.figures.get("mean_iou")) is not None:
            return measured(figure)
        why = f"data={subject.data.name} is scored by {', '.join(subject.figures)}; evals=[quality] measures them"
        return Measurement(None, "fraction", reason=why)
