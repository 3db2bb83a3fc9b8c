"""Number of parameters that are not zero: what weight sparsity changes, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evals.base import Measurement, Measurements, Subject


@dataclass(frozen=True)
class NonzeroParams:
    """Non-zero parameters, tied ones counted once."""

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Count each model's non-zero parameters."""
        counts = (sum(int(torch.count_nonzero(p)) for p in s.model.network.parameters()) for s in subjects)
        return [{"nonzero_params": Measurement(count, "count")} for count in counts]
