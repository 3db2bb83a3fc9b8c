"""How much each matrix of a model is to lose, from its weights and what it reads."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from prune.sensitivity.allocation import removed_counts
from prune.weights.allocation import alpha, global_counts, outlier_share, owl, tail_exponent, whole_counts
from prune.weights.masks import Share
from prune.weights.matrices import Matrix, linear_of
from prune.weights.statistics import SquaredNorms
from prune.weights.walk import Walk
from utils.storage import Artifact, Scratch

if TYPE_CHECKING:
    from prune.weights.method import WeightSparsity


def shares_of(
    method: "WeightSparsity", model: PrunableModel, matrices: Sequence[Matrix], batches: Sequence[Batch],
    device: torch.device, scratch: Scratch,
) -> Mapping[str, Share]:  # fmt: skip
    """Fraction of each linear to remove, by name.

    Any other allocation than `uniform` looks at the whole dense model first, once; its result is kept in
    the scratch, so that a run that goes on has the same.
    """
    if method.allotting == "uniform":
        return {matrix.name: method.ratio for matrix in matrices}
    if (left := scratch.load()) is not None:
        return {name: Fraction(*pair) for name, pair in left.facts["shares"].items()}
    counts = _counts(method, model, matrices, batches, device)
    shares = {m.name: Fraction(count, m.size) for m, count in zip(matrices, counts, strict=True)}
    pairs = {name: [share.numerator, share.denominator] for name, share in shares.items()}
    scratch.save(Artifact({}, {"shares": pairs}))
    return shares


def _counts(
    method: "WeightSparsity", model: PrunableModel, matrices: Sequence[Matrix], batches: Sequence[Batch],
    device: torch.device,
) -> list[int]:  # fmt: skip
    sizes = [matrix.size for matrix in matrices]
    if method.allotting not in ("global", "owl", "alpha"):
        by_name = dict(zip((matrix.name for matrix in matrices), sizes, strict=True))
        return list(removed_counts(method.allotting, by_name, method.ratio).values())
    norms = _norms(method, model, matrices, batches, device) if method.looks_at_data else {}

    def scores(matrix: Matrix) -> Tensor:
        weight = linear_of(model.network, matrix.name).weight.detach()
        known = norms.get(matrix.name)
        return method.scores(weight, None if known is None else known.to(weight.device))

    if method.allotting == "global":
        return global_counts([scores(matrix) for matrix in matrices], method.ratio)
    layers = sorted({matrix.layer for matrix in matrices})
    blocks = [[matrix for matrix in matrices if matrix.layer == layer] for layer in layers]
    weights = [sum(matrix.size for matrix in block) for block in blocks]
    if method.allotting == "owl":
        outliers = [outlier_share([scores(matrix) for matrix in block], method.owl_multiple) for block in blocks]
        found = owl(outliers, weights, method.ratio, method.owl_spread)
    else:
        exponents = [fmean(_exponent(model, matrix) for matrix in block) for block in blocks]
        found = alpha(exponents, weights, method.ratio, method.alpha_epsilon)
    by_layer = dict(zip(layers, found, strict=True))
    return whole_counts([by_layer[matrix.layer] for matrix in matrices], sizes, method.ratio)


def _exponent(model: PrunableModel, matrix: Matrix) -> float:
    return tail_exponent(linear_of(model.network, matrix.name).weight.detach())


def _norms(
    method: "WeightSparsity", model: PrunableModel, matrices: Sequence[Matrix], batches: Sequence[Batch],
    device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """Norms of what every linear reads in the dense model, in one pass."""
    walk, found = Walk(model, batches, device, method.offload), {}
    last = max(matrix.layer for matrix in matrices)
    for layer in range(last + 1):
        names = [matrix.name for matrix in matrices if matrix.layer == layer]
        with walk.resident(layer):
            if not names:
                walk.advance(layer)
                continue
            for stage, statistic in walk.statistics(layer, names, SquaredNorms, go_on=layer < last):
                found |= dict.fromkeys(stage, statistic.norms())
    return found
