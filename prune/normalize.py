"""Making scores of different unit groups comparable before they are ranked together."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["none", "mean", "max", "rank", "lamp"]


def normalized(scores: Mapping[str, Tensor], how: Normalization) -> dict[str, Tensor]:
    """Normalise each group's scores by themselves.

    Args:
        scores: Per group (count,), higher means keep.
        how: `none` leaves them; `mean` and `max` divide by the group's mean or largest
            absolute score; `rank` replaces each score by its rank in (0, 1], ties sharing the
            mean rank; `lamp` divides each squared score by the sum of all squared scores that
            are not smaller (layer-adaptive magnitude, Lee et al., ICLR 2021, arXiv:2010.07611).

    Returns:
        Per group (count,), float32.
    """
    rules = {"none": _same, "mean": _by_mean, "max": _by_max, "rank": _by_rank, "lamp": _lamp}
    rule = rules[how]
    return {name: rule(values.double()).float() if len(values) else values for name, values in scores.items()}


def _same(values: Tensor) -> Tensor:
    return values


def _by_mean(values: Tensor) -> Tensor:
    return values / _nonzero(values.abs().mean())


def _by_max(values: Tensor) -> Tensor:
    return values / _nonzero(values.abs().max())


def _by_rank(values: Tensor) -> Tensor:
    _, inverse, repeats = values.unique(return_inverse=True, return_counts=True)
    last = repeats.cumsum(0)  # highest rank of each distinct value
    mean_rank = last - (repeats - 1) / 2
    return mean_rank[inverse] / len(values)


def _lamp(values: Tensor) -> Tensor:
    squares, inverse, repeats = values.square().unique(return_inverse=True, return_counts=True)
    not_smaller = (squares * repeats).flip(0).cumsum(0).flip(0)
    return (squares / _nonzero(not_smaller))[inverse]


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
