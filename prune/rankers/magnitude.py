"""Magnitude: a unit matters as much as its weights are large."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import PrunableModel, UnitGroup
from prune.base import Scores
from prune.structural import Structural

Norm = Literal["l1", "l2"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Structural):
    """L1 or L2 norm of all weights of a unit, in its producers and its consumer.

    Attributes:
        norm: `l1` or `l2`.
    """

    norm: Norm = "l2"

    looks_at_data: ClassVar[bool] = False

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Measure every unit's weights; no data is looked at."""
        norms = {g.name: unit_norms(unit_weights(model.network, g), self.norm) for g in model.unit_groups()}
        return Scores({"magnitude": norms})


def unit_weights(network: nn.Module, group: UnitGroup) -> list[Tensor]:
    """The weights of each unit, one (count, weights) matrix per slice; buffers hold no weights."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    found = []
    for part in group.slices:
        if part.tensor in parameters:
            tensor = parameters[part.tensor].detach().movedim(part.dim, 0)  # (length, *rest)
            found.append(tensor[part.index.to(tensor.device)].flatten(1))  # (count, positions * rest)
    return found


def unit_norms(weights: list[Tensor], norm: Norm) -> Tensor:
    """Norm over all weights of each unit.

    Args:
        weights: Matrices of (count, weights).
        norm: `l1` sums absolute values, `l2` is the root of the sum of squares.

    Returns:
        (count,), float32, CPU.
    """
    if norm == "l1":
        sums = [matrix.float().abs().sum(dim=1) for matrix in weights]
        return torch.stack(sums).sum(dim=0).cpu()
    squares = [matrix.float().square().sum(dim=1) for matrix in weights]
    return torch.stack(squares).sum(dim=0).sqrt().cpu()
