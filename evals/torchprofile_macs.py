"""Torchprofile's figure, under its own name: a third party's count of the traced graph."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor, nn

from evals.base import Measurement, Measurements, Subject
from models.base import PrunableModel

UNIT = "torchprofile MAC/sample"
MISSES = "operators without a handler count as nothing; norms and poolings are counted; attention products are"


@dataclass(frozen=True)
class Torchprofile:
    """MACs of one sample as torchprofile counts the traced graph: norms included, unknown operators left out."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Count each model."""
        return [{"torchprofile_macs": self._count(subject)} for subject in subjects]

    def _count(self, subject: Subject) -> Measurement:
        if find_spec("torchprofile") is None:
            return Measurement(
                None, UNIT, "torchprofile is not installed (pip install -r requirements-torchprofile.txt)"
            )
        example = subject.model.place(subject.data.example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                profile_macs = import_module("torchprofile").profile_macs
                tracer = _Positional(subject.model, list(example))
                return Measurement(int(profile_macs(tracer, tuple(example.values()))), UNIT, details={"misses": MISSES})
            except Exception as error:  # a third party's tracer may fail on any model: say so, go on
                return Measurement(None, UNIT, f"torchprofile failed: {type(error).__name__}: {error}")


class _Positional(nn.Module):
    """Gives a tracer a module with positional tensors."""

    def __init__(self, model: PrunableModel, names: list[str]) -> None:
        super().__init__()
        self.network, self.model, self.names = model.network, model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model.logits(dict(zip(self.names, tensors, strict=True)))
