"""Weight magnitude: the smallest weights go. No data is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prune.weights.masks import Share
from prune.weights.matrices import Solved
from prune.weights.method import WeightSparsity
from prune.weights.statistics import SquaredNorms, Statistic
from utils.errors import InputError


@dataclass(frozen=True, kw_only=True)
class WeightMagnitude(WeightSparsity):
    """Scores `|W|`; by default the weights of one matrix compete with each other."""

    own_group = "tensor"
    looks_at_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "owl":
            raise InputError(
                "prune.allocation=owl: looks at activations; must be uniform, global or alpha with weight_magnitude"
            )

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "weight_magnitude"

    def statistic(self) -> Statistic:
        """Not asked for."""
        return SquaredNorms()

    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """`|W|`, (O, I), float32."""
        return magnitude(weight)

    def solve(self, weights: Sequence[Tensor], statistic: Statistic | None, shares: Sequence[Share]) -> list[Solved]:
        """Mask each matrix by itself."""
        return [Solved(self.mask(magnitude(w), share)) for w, share in zip(weights, shares, strict=True)]


def magnitude(weight: Tensor) -> Tensor:
    """Absolute weights, float32."""
    return weight.float().abs()
