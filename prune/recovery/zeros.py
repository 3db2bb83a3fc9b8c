"""Zeros that survive training: what weight sparsity removed stays removed."""

from collections.abc import Callable

import torch
from torch import nn


def zeros_kept(pruned: nn.Module, dense: nn.Module) -> Callable[[], None] | None:
    """What puts the zeros back that pruning has made, to be called after every step of a training.

    A weight of two or more dimensions is sparse if it is zero anywhere that the dense one of
    the same name and shape is not; then all its zeros stay. A weight that starts at zero in
    both (a fresh head) may move.

    Args:
        pruned: The network that is going to be trained, as pruning left it.
        dense: The network before.

    Returns:
        None if there is nothing to keep.
    """
    before = dict(dense.named_parameters())
    masks = []
    for name, weight in pruned.named_parameters():
        old = before.get(name)
        if weight.ndim < 2 or old is None or old.shape != weight.shape:
            continue
        zero = weight.detach() == 0
        if bool((zero & (old.detach() != 0)).any()):
            masks.append((weight, zero))

    @torch.no_grad()
    def put_back() -> None:
        for weight, zero in masks:
            weight.masked_fill_(zero, 0)

    return put_back if masks else None
