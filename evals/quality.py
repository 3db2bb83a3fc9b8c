"""Quality: the task's own metrics, each under its own name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.base import Figure
from evals.base import Measurement, Measurements, Subject


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
        return [{name: measured(figure) for name, figure in subject.figures.items()} for subject in subjects]


def measured(figure: Figure) -> Measurement:
    """A task's figure as a measurement."""
    reason = figure.reason or ("it is not defined: all answers are the same" if figure.value is None else None)
    return Measurement(figure.value, figure.unit, reason, figure.details)
