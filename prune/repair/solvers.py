"""Refit and gate tuning as they go through a model, one consumer after the other."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune.repair.gates import tuned_scales
from prune.repair.normal import Normal
from prune.repair.rebuild import Which
from prune.repair.refit import refitted
from prune.repair.rows import Reader


@dataclass(frozen=True)
class Refit:
    """Least-squares reconstruction of every consumer.

    Attributes:
        ridge: Pull towards the present weights, in mean squares of the inputs.
        follow: How much of the stream's error a consumer makes up for.
    """

    ridge: float
    follow: float

    def rows(self, reader: Reader) -> Which:
        """All of them."""
        return "all"

    def solve(self, reader: Reader, normal: Normal, scale: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        """The ridge solution; a factor behind the consumer acts on outputs one by one and changes nothing."""
        return refitted(normal, self.ridge, reader.biased), {}


@dataclass
class GateTuning:
    """A scale for every unit, folded into the consumer's weights.

    Attributes:
        last: The last consumer of neurons, of which only the first tokens count; None where all tokens are read.
        stopped: Whether tuning has ended: later consumers stay as they are.
    """

    last: str | None = None
    follow: float = 1.0
    stopped: bool = False

    def rows(self, reader: Reader) -> Which:
        """None for attention in the first layer, for consumers without units, and after a failure."""
        attends = any(group.pairwise_features and group.layer == 0 for group in reader.groups)
        if self.stopped or attends or not sum(group.count for group in reader.groups):
            return "none"
        return "first" if reader.name == self.last else "all"

    def solve(self, reader: Reader, normal: Normal, scale: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        """Fold the tuned scales into the weights, or stop."""
        units, count = reader.units(), sum(group.count for group in reader.groups)
        matrix, weighed = reader.matrix(), normal
        if scale is not None:  # outputs count as the stream sees them
            factor = scale.double().expand(reader.outputs)
            weighed = Normal(normal.gram, normal.cross * factor, normal.error, normal.rows)
            matrix = matrix * factor
        intercept = any(group.pairwise_features for group in reader.groups)
        scales = tuned_scales(weighed, matrix, units, count, intercept)
        if scales is None:
            self.stopped = True
            return None, {"stopped": True}
        delta = torch.zeros_like(normal.cross)
        of_column = torch.cat([scales, scales.new_ones(1)])[units.to(scales.device)]  # -1 is the last: left alone
        delta[:-1] = reader.matrix() * (of_column - 1)[:, None]
        return delta, {"smallest_scale": float(scales.min()), "largest_scale": float(scales.max())}
