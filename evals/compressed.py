"""Telling a model that was only compressed from one that can be faster."""

import torch

from models.base import PrunableModel

ONLY_COMPRESSED = "compression only: its zeros take as much time as other weights, no sparse kernel is used"


def only_compressed(pruned: PrunableModel, dense: PrunableModel) -> bool:
    """Whether all that sets a model apart from the dense one is zeros in its weights.

    That is: the same tensors with the same shapes, the same flow of tokens, and a weight of two or more
    dimensions with more zeros than the dense one has.
    """
    if pruned is dense or pruned.reduction != dense.reduction:
        return False
    before = dict(dense.network.named_parameters())
    after = dict(pruned.network.named_parameters())
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return False
    return any(_zeros(after[name]) > _zeros(before[name]) for name in before if before[name].ndim >= 2)


def _zeros(weight: torch.Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight.detach()))
