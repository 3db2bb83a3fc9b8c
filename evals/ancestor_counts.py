"""What the ancestor's published table shows, measured on one batch: kept tokens, and "FLOPs" by fvcore.

Its figures are MACs, without attention products and with five operations an element of each norm, of a whole batch.
The executed MACs stand beside them. For `model=ancestor_encoder` only.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from data.base import DataBundle
from evals.base import Measurement, Measurements, Subject
from models.base import Batch, PrunableModel
from models.batch_cost import EncoderShape
from utils.errors import InputError


@runtime_checkable
class Counted(Protocol):
    """A model that says what it keeps, and its sizes."""

    @property
    def shape(self) -> EncoderShape:
        """Its sizes."""
        ...

    def kept_counts(self, batch: Batch) -> list[list[int]]:
        """Tokens that each sample of a batch keeps, layer by layer."""
        ...


@dataclass(frozen=True)
class AncestorCounts:
    """Kept tokens and fvcore's count of the first validation batch, as the ancestor's table has them."""

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse any other model.

        Raises:
            InputError: If the model does not count what it keeps.
        """
        if not isinstance(model, Counted):
            raise InputError("evals=ancestor_counts: counts model=ancestor_encoder alone; evals=macs counts the others")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Count each model on the same batch."""
        return [self._count(subject) for subject in subjects]

    def _count(self, subject: Subject) -> Measurements:
        model, batch = subject.model, next(iter(subject.data.validation))
        assert isinstance(model, Counted)
        layers = model.kept_counts(batch)
        samples, longest = len(layers[0]), max(layers[0])
        # the attention is over the B samples at each of the padded positions
        executed = model.shape.macs(samples * longest, longest * samples**2)
        kept = {"counts": layers[0], "layers_alike": all(layer == layers[0] for layer in layers), "longest": longest}
        return {
            "kept_tokens": Measurement(sum(layers[0]) / samples, "token/sample", details=kept),
            "fvcore_flops": self._fvcore(subject.model, batch, model.shape.fvcore_flops(samples * longest)),
            "executed_macs": Measurement(executed, f"MAC/batch of {samples}"),
        }

    def _fvcore(self, model: PrunableModel, batch: Batch, closed_form: int) -> Measurement:
        unit, details = f"fvcore FLOP/batch of {len(batch['inputs'])}", {"closed_form": closed_form}
        try:
            return Measurement(_traced(model, batch), unit, details=details)
        except Exception as error:  # a third party's tracer: say so, the closed form stands
            return Measurement(None, unit, reason=f"fvcore failed: {type(error).__name__}: {error}", details=details)


def _traced(model: PrunableModel, batch: Batch) -> int:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        analysis: Any = FlopCountAnalysis(model.network, (model.place(batch)["inputs"],))
        return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
