"""SparseGPT: remove weights column by column, and let those behind them make up for it.

Frantar and Alistarh, ICML 2023, arXiv:2301.00774. Weights are kept as (I, O) here, so that a
column of the layer is one contiguous row. Shapes: I inputs, O outputs (of all linears that
share the input, one after the other).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from prune.weights import cholesky
from prune.weights.cholesky import inverse_factored
from prune.weights.masks import Pattern, Share, lowest, lowest_few, refuse_non_finite, removed_count
from prune.weights.matrices import Solved
from prune.weights.method import CODE, WeightSparsity
from prune.weights.products import product
from prune.weights.statistics import Gram, Statistic
from prune.weights.wanda import wanda
from utils.errors import InputError, RunError
from utils.rules import Count, NonNegative

# columns whose errors are brought in one by one; further ones get them by one product
STEP = 16
LARGEST_DAMPING = 10.0


@dataclass(frozen=True, kw_only=True)
class SparseGPT(WeightSparsity):
    """Removes what costs least of the layer's output, and updates the weights behind it.

    Attributes:
        percdamp: Share of the mean diagonal that is added to the Gram matrix, ten times as much
            where that does not do, and recorded.
        block_size: Columns that weights are chosen from together.
    """

    percdamp: NonNegative = 0.01
    block_size: Count = 128

    own_group = None
    ranking_code = (*CODE, cholesky)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None:
            raise InputError(f"prune.group={self.group}: must be null; sparsegpt compares within its blocks of columns")
        if self.chosen is not None and self.block_size % self.chosen.of:
            raise InputError(
                f"prune.block_size={self.block_size}: must be a multiple of prune.pattern={self.pattern}'s m"
            )

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "sparsegpt"

    def statistic(self) -> Statistic:
        """The Gram matrix of the input's features."""
        return Gram()

    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """Wanda's scores, which allocations look at, (O, I), float32."""
        assert norms is not None
        return wanda(weight, norms)

    def solve(self, weights: Sequence[Tensor], statistic: Statistic | None, shares: Sequence[Share]) -> list[Solved]:
        """Prune all linears that read one input in one sweep; the Gram matrix is factored once."""
        assert isinstance(statistic, Gram)
        factor = inverse_factor(statistic.gram(), self.percdamp)
        facts = {"damping": factor.damping, "dead_inputs": int(factor.dead.sum())}
        for weight in weights:
            refuse_non_finite(weight, "weights")
        solutions = sparsegpt(weights, factor, shares, self.chosen, self.block_size)
        # looked at once, and not with every block of columns: each look waits for the device
        for solution in solutions:
            refuse_non_finite(solution.weight, "updated weights")
        return [Solved(s.removed, s.weight, facts | {"error": float(s.loss.sum())}) for s in solutions]

    def notes_on(self, facts: Mapping[str, Any]) -> list[str]:
        """Matrices that needed more damping than asked for."""
        more = {n: f["damping"] for n, f in facts["matrices"].items() if f["damping"] > self.percdamp}
        said = f"{len(more)} Gram matrices needed more damping than prune.percdamp={self.percdamp}: up to "
        return [*super().notes_on(facts), *([f"{said}{max(more.values()):g} ({next(iter(more))})."] if more else [])]


@dataclass(frozen=True)
class Factor:
    """The inverse Gram matrix of an input, factored.

    Attributes:
        upper: U with `H^-1 = U^T U`, (I, I), float32.
        dead: Inputs that were zero in every token, (I,), bool.
        damping: Share of the mean diagonal that was added to it in the end.
    """

    upper: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class Solution:
    """Weights after the update, (O, I); which were removed, (O, I); and `1/2 sum (w - q)^2 / U_jj^2`, (O,)."""

    weight: Tensor
    removed: Tensor
    loss: Tensor


def inverse_factor(gram: Tensor, damping: float) -> Factor:
    """Factor the inverse of a Gram matrix, with as much more damping as it needs.

    Args:
        gram: H, (I, I), float32.
        damping: Share of the mean diagonal to add to it. Where the matrix is not positive definite,
            ten times as much, and so on up to 10.

    Raises:
        RunError: If it is not finite, or no damping up to the cap helps.
    """
    if not all(map(isfinite, map(float, gram.aminmax()))):
        raise RunError("the Gram matrix of an input is not finite; activations must be finite")
    dead = gram.diagonal() == 0
    diagonal = gram.diagonal() + dead.float()
    mean, used = diagonal.mean(), damping
    while True:
        damped = gram.clone()
        damped.diagonal().copy_(diagonal + used * mean)
        upper = inverse_factored(damped)
        if upper is not None:
            return Factor(upper, dead, used)
        following = 10 * used if used else 0.01
        if following > max(LARGEST_DAMPING, damping):
            raise RunError(
                f"prune.percdamp={damping}: the Gram matrix of an input is not positive definite with a damping of "
                f"{used:g} either; use more calibration tokens"
            )
        used = following


def sparsegpt(
    weights: Sequence[Tensor], factor: Factor, shares: Sequence[Share], pattern: Pattern | None = None, width: int = 128
) -> list[Solution]:
    """Prune linears that read the same input; each by itself, in one sweep over the columns.

    Args:
        weights: Of each linear, (O, I); any floating type.
        factor: Of their common input.
        shares: Fraction of each linear to remove; a pattern decides by itself.
        pattern: n of every m inputs, chosen from weights that are updated already.
        width: Columns of a block; a multiple of the pattern's m.

    Returns:
        One solution a linear, float32.
    """
    rows = [len(weight) for weight in weights]
    left = torch.cat([weight.float() for weight in weights]).T.contiguous()  # (I, O)
    left[factor.dead] = 0
    removed = torch.zeros_like(left, dtype=torch.bool)
    loss = left.new_zeros(left.shape[1])
    for start in range(0, len(left), width):
        stop = min(start + width, len(left))
        upper = factor.upper[start:stop, start:stop]
        block, out = left[start:stop], removed[start:stop]
        if pattern is None:
            saliency = (block / upper.diagonal()[:, None]).square()
            out.copy_(_lowest_of_block(saliency, rows, shares, start, stop))
        errors = _sweep(block, out, upper, pattern)
        loss += errors.square().sum(dim=0) / 2
        left[stop:] -= product(factor.upper[start:stop, stop:].T, errors)
    parts = (part.split(rows, dim=-1) for part in (left, removed, loss))
    return [Solution(w.T.contiguous(), r.T.contiguous(), e) for w, r, e in zip(*parts, strict=True)]


def _lowest_of_block(saliency: Tensor, rows: Sequence[int], shares: Sequence[Share], start: int, stop: int) -> Tensor:
    """The lowest of every linear's part of a block, so many that its count is right after each block."""
    masks = []
    for part, share in zip(saliency.split(list(rows), dim=1), shares, strict=True):
        count = removed_count(share, part.shape[1] * stop) - removed_count(share, part.shape[1] * start)
        scores = part.T.contiguous()  # (O, columns): ties go to the lowest index of the layer's own order
        masks.append(lowest(scores.reshape(1, -1), count).view_as(scores).T)  # (1, O*columns) -> (columns, O)
    return torch.cat(masks, dim=1)


def _sweep(block: Tensor, removed: Tensor, upper: Tensor, pattern: Pattern | None) -> Tensor:
    """Remove a block's weights from left to right, in place.

    Args:
        block: Weights, (columns, O); afterwards updated, with zeros where removed.
        removed: (columns, O); filled in here where there is a pattern.
        upper: U of the block, (columns, columns).
        pattern: n of every m inputs, or None.

    Returns:
        Errors `(w - q) / U_jj`, (columns, O), which the columns behind the block make up for.
    """
    errors = torch.zeros_like(block)
    step = pattern.of if pattern else STEP
    inverse = 1 / upper.diagonal()
    for start in range(0, len(block), step):
        part = block[start : start + step]
        stop = start + len(part)
        part.addmm_(upper[:start, start:stop].T, errors[:start], alpha=-1)
        if pattern is not None:
            scores = (part * inverse[start:stop, None]).square()
            removed[start:stop] = lowest_few(scores, pattern.zeros)
        factors = removed[start:stop] * inverse[start:stop, None]  # 0 where a weight stays
        for column in range(start, stop):
            weight = block[column]
            if column > start:
                weight.addmv_(errors[start:column].T, upper[start:column, column], alpha=-1)
            torch.mul(weight, factors[column - start], out=errors[column])
        part.masked_fill_(removed[start:stop], 0)
    return errors
