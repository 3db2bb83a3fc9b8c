"""What a metric is given and what it returns."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from data.base import DataBundle, Figure
from evals.predictions import Predictions, kept_predictions, predictions_of
from models.base import Batch, PrunableModel
from utils.errors import InputError
from utils.storage import Store


@dataclass(frozen=True)
class Measurement:
    """A number with its unit; a value that could not be measured is None with a reason, never 0.

    Attributes:
        value: The figure, or None.
        unit: Its unit.
        reason: Why there is no value.
        details: Further figures that belong to it, by name.
        how: How it was measured, in one sentence; empty: the first line of the metric's own description.
        files: What lies beside the record by ending, such as `raw.json`; the run names them.
    """

    value: float | int | None
    unit: str
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values with a `status` (measured, estimated, unreliable, null); `reason` only where there is none."""
        how = {"how": self.how} if self.how else {}
        if isinstance(self.value, float) and not math.isfinite(self.value):
            return {"value": None, "unit": self.unit, "status": "null", "reason": f"the value is {self.value}", **how}
        state: dict[str, Any] = {"status": self.details.get("status", "measured")}
        if self.value is None:
            state = {"status": "null", "reason": self.reason}
        return {"value": self.value, "unit": self.unit, **self.details, **state, **how}


class Subject:
    """One model to measure, with its data; what several metrics need is computed once.

    Args:
        model: The model to measure.
        data: Where its samples come from.
        store: Keeps its predictions for other runs; for the dense model of a sweep.
    """

    def __init__(self, model: PrunableModel, data: DataBundle, store: Store | None = None) -> None:
        self.model, self.data, self.store = model, data, store
        self.joint = True
        self._answers: dict[str, Predictions] = {}

    def alone(self) -> "Subject":
        """The same for one process of a run, which asks no other one for anything; what is known stays known."""
        twin = copy.copy(self)
        twin.joint, twin._answers = False, dict(self._answers)
        twin.store = None if self.store is None else replace(self.store, joint=False)
        return twin

    @cached_property
    def predictions(self) -> Predictions:
        """Logits of every validation batch, on the CPU, with what scoring needs of the batch.

        What a task condenses stands in the place of logits that are too large to keep.
        """
        if self.store is None:
            return predictions_of(self.model, self.data, joint=self.joint)
        return kept_predictions(self.model, self.data, self.store)

    def answers(self, batches: Iterable[Batch], identity: str) -> Predictions:
        """The same for other batches, once for all metrics that ask for them.

        Args:
            batches: What is answered.
            identity: Hash of the batches.
        """
        if identity not in self._answers:
            if self.store is None:
                found = predictions_of(self.model, self.data, batches, self.joint)
            else:
                found = kept_predictions(self.model, self.data, self.store, batches, identity)
            self._answers[identity] = found
        return self._answers[identity]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The task's own metrics on the validation split."""
        return self.data.task.figures(self.predictions)

    def batch_of(self, size: int) -> Batch:
        """`size` samples of the example's shape on the model's device; the same for every model.

        Validation samples, repeated if there are fewer; where samples differ in length the
        example is repeated, so that times and MACs speak of the same shape.
        """
        shapes = {name: tensor.shape[1:] for name, tensor in self.data.example.items()}
        taken: list[Batch] = []
        for batch in self._endless():
            inputs = {name: tensor for name, tensor in batch.items() if name in shapes}
            alike = {name: tensor.shape[1:] for name, tensor in inputs.items()} == shapes
            taken.append(inputs if alike else self.data.example)
            if sum(len(next(iter(b.values()))) for b in taken) >= size:
                break
        joined = {name: torch.cat([batch[name] for batch in taken])[:size] for name in shapes}
        return self.model.place(joined)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.data.validation


Measurements = dict[str, Measurement]


class Metric(Protocol):
    """Measures all models of a comparison in the same way, so that they can be interleaved."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Return, for each subject, one or more measurements by name."""
        ...


@runtime_checkable
class Checking(Protocol):
    """A metric that can tell before any work that it could not measure."""

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse a model or data that it has no value for, and settings that they rule out.

        Raises:
            InputError: That names the key, its value and the rule.
        """
        ...


def refuse_unmeasurable(metrics: Mapping[str, Metric], model: PrunableModel, data: DataBundle) -> None:
    """Raise one InputError with everything that the chosen metrics can't measure."""
    found = dict[str, None]()
    for metric in metrics.values():
        try:
            if isinstance(metric, Checking):
                metric.check(model, data)
        except InputError as error:
            found[str(error)] = None
    if found:
        raise InputError("\n".join(found))
