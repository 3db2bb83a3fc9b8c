"""Size of the saved model: bytes of its safetensors file."""

from collections.abc import Sequence
from dataclasses import dataclass

from safetensors.torch import save

from evals.base import Measurement, Measurements, Subject
from models.checkpoint import METADATA, tensors_of


@dataclass(frozen=True)
class Size:
    """Bytes of the very file that `save=true` writes."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Serialise each model and count."""
        return [{"size": Measurement(len(save(tensors_of(subject.model), METADATA)), "byte")} for subject in subjects]
