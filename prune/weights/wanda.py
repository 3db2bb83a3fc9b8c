"""Wanda: weights by their size times the norm of what they read (Sun et al., ICLR 2024, arXiv:2306.11695).

Shapes: O outputs, I inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prune.weights.masks import Share, refuse_non_finite
from prune.weights.matrices import Matrix, Solved
from prune.weights.method import WeightSparsity
from prune.weights.statistics import SquaredNorms, Statistic
from utils.errors import InputError

TOLERANCE = 0.001


@dataclass(frozen=True, kw_only=True)
class Wanda(WeightSparsity):
    """Scores `|W_ij| * norm(X_j)`; by default the weights of one output compete with each other.

    Attributes:
        variant: `fixed` removes the same part of every row; `alpha` removes from each row the
            lowest scores that add up to a part of its sum, the same part for all rows of a matrix.
    """

    variant: Literal["fixed", "alpha"] = "fixed"

    own_group = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "alpha" and (self.chosen is not None or self.group not in (None, "row")):
            raise InputError(
                f"prune.variant=alpha: compares within rows; prune.group={self.group} must be null or row, "
                f"and prune.pattern={self.pattern} must be unstructured"
            )

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "wanda"

    def statistic(self) -> Statistic:
        """Norms of the input's features."""
        return SquaredNorms()

    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """`|W| * norms`, (O, I), float32."""
        assert norms is not None
        return wanda(weight, norms)

    def solve(self, weights: Sequence[Tensor], statistic: Statistic | None, shares: Sequence[Share]) -> list[Solved]:
        """Mask each of the linears that read one input by itself."""
        assert statistic is not None
        norms = statistic.norms()
        return [self._solved(wanda(w, norms), share) for w, share in zip(weights, shares, strict=True)]

    def expected(self, matrix: Matrix, share: Share) -> int | None:
        """The alpha variant comes close, and says how close."""
        return None if self.variant == "alpha" else super().expected(matrix, share)

    def notes_on(self, facts: Mapping[str, Any]) -> list[str]:
        """Matrices that the alpha variant left further from the ratio than the published tolerance."""
        far = [name for name, found in facts["matrices"].items() if abs(found.get("off", 0.0)) > TOLERANCE]
        found = (
            [f"{len(far)} matrices are off their ratio by more than {TOLERANCE}, {far[0]} the first."] if far else []
        )
        return [*super().notes_on(facts), *found]

    def _solved(self, scores: Tensor, share: Share) -> Solved:
        if self.variant == "fixed":
            return Solved(self.mask(scores, share))
        mask, alpha = alpha_mask(scores, float(share))
        off = float(mask.float().mean()) - float(share)
        return Solved(mask, facts={"alpha": alpha, "off": off})


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W_ij| * norm(X_j)`.

    Args:
        weight: (O, I).
        norms: Root mean square of each input feature, (I,): per token, so that matrices compare.

    Returns:
        (O, I), float32.
    """
    return weight.float().abs() * norms


def alpha_mask(scores: Tensor, share: float) -> tuple[Tensor, float]:
    """Remove from every row the lowest scores whose sum is at most `alpha` of the row's.

    Alpha is bisected, from 0.4 in [0, 0.8] as published, and up to 1 where that is not enough.

    Args:
        scores: (O, I), not negative.
        share: Fraction of the matrix to remove.

    Returns:
        The mask, (O, I), and alpha.
    """
    refuse_non_finite(scores)
    if share in (0, 1):
        return torch.full_like(scores, share == 1, dtype=torch.bool), float(share)
    ordered, order = scores.sort(dim=1, stable=True)
    sums = ordered.double().cumsum(dim=1)
    parts = sums / sums[:, -1:].clamp_min(1e-300)  # (O, I): share of the row's sum up to here
    low, high, alpha = 0.0, 0.8, 0.4
    if float((parts <= high).double().mean()) < share:
        high, alpha = 1.0, 0.9
    for _ in range(40):
        reached = float((parts <= alpha).double().mean())
        if abs(reached - share) <= TOLERANCE or high - low < 1e-9:
            break
        low, high = (low, alpha) if reached > share else (alpha, high)
        alpha = (low + high) / 2
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, parts <= alpha), alpha
