"""Accuracy: the share of validation samples whose largest logit is the label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.base import Classification
from evals.base import Measurement, Measurements, Subject
from utils.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """Fraction correct on the validation split, with its standard error and the chance level."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Score each model's predictions."""
        return [{"accuracy": self._accuracy(subject)} for subject in subjects]

    def _accuracy(self, subject: Subject) -> Measurement:
        task = subject.data.task
        if not isinstance(task, Classification):
            raise InputError(
                f"evals.accuracy: data={subject.data.name} is for {task.name}; accuracy needs classification"
            )
        correct = torch.cat([task.correct(logits, batch) for logits, batch in subject.predictions])
        share, count = float(correct.double().mean()), len(correct)
        details = {"standard_error": standard_error(share, count), "samples": count, "chance": 1 / task.classes}
        return Measurement(share, "fraction", details=details)


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent samples."""
    return math.sqrt(share * (1 - share) / count)
