"""Number of parameters, tied ones counted once."""

from collections.abc import Sequence
from dataclasses import dataclass

from evals.base import Measurement, Measurements, Subject


@dataclass(frozen=True)
class Params:
    """Parameters that the model really holds; buffers are none."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Count each model's parameters."""
        counts = (sum(p.numel() for p in subject.model.network.parameters()) for subject in subjects)
        return [{"params": Measurement(count, "count")} for count in counts]
