"""Quality: the task's own metrics, each under its own name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.base import Figure
from evals.base import Measurement, Measurements, Subject
from evals.each_sample import right_of_each


@dataclass(frozen=True)
class Quality:
    """Every metric that the data's task is scored by, over the validation split.

    Classification: accuracy (and F1 or Matthews correlation where the benchmark asks for
    them); regression: Pearson and Spearman correlation; question answering: exact match and F1;
    language modelling: perplexity and accuracy per token of the validation samples.
    """

    divides: ClassVar[bool] = True

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [
            {
                name: measured(figure, subject if name == "accuracy" else None)
                for name, figure in subject.figures.items()
            }
            for subject in subjects
        ]


def measured(figure: Figure, subject: Subject | None = None) -> Measurement:
    """A task's figure as a measurement.

    Args:
        figure: The figure.
        subject: Whose accuracy it is: which samples are right is then left beside the record.
    """
    reason = figure.reason or ("it is not defined: all answers are the same" if figure.value is None else None)
    files = right_of_each(subject) if subject else {}
    return Measurement(figure.value, figure.unit, reason, figure.details, files=files)
