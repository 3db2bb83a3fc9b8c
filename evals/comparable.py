"""What must not be compared: models that answer other questions, or samples of other data."""

from collections.abc import Sequence

import torch

from evals.base import Subject
from utils.errors import InputError


def refuse_incomparable(subjects: Sequence[Subject]) -> None:
    """Refuse subjects that differ in their data or in the shape of their answers.

    Raises:
        InputError: It names what differs, and both values.
    """
    first, *others = subjects
    for other in others:
        for part, value in first.data.fingerprints.items():
            found = other.data.fingerprints.get(part)
            if found != value:
                raise InputError(
                    f"comparison of {first.model.name} and {other.model.name}: {part} data have the fingerprints "
                    f"{value} and {found}; models are compared on the same data only"
                )
        if other.model is not first.model and (wanted := _head(first)) != (found := _head(other)):
            raise InputError(
                f"comparison of {first.model.name} and {other.model.name}: one sample gives answers of the shapes "
                f"{wanted} and {found}; models are compared with the same class head only"
            )


def _head(subject: Subject) -> tuple[int, ...]:
    """Shape of the answer to the example without the batch dimension."""
    with torch.inference_mode():
        return tuple(subject.model.logits(subject.model.place(subject.data.example)).shape[1:])
