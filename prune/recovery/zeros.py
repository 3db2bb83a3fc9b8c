"""Zeros that survive training: what weight sparsity removed stays removed."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import PrunableModel


def sparse_weights(model: PrunableModel) -> frozenset[str]:
    """Names of the weights whose zeros were put there before; none unless the model says that it is sparse."""
    blocks = [(block, model.network.get_submodule(block)) for block in model.blocks() if model.sparse]
    named = [pair for block, module in blocks for pair in module.named_modules(prefix=block)]
    return frozenset(f"{name}.weight" for name, module in named if isinstance(module, nn.Linear))


def kept_zeros(pruned: nn.Module, dense: nn.Module, sparse: Collection[str] = ()) -> dict[str, Tensor]:
    """Where the zeros lie that pruning has made, by the weight's name; bool, of the weight's shape.

    A weight of two or more dimensions is sparse if it is zero anywhere that the dense one of
    the same name and shape is not; then all its zeros stay. A weight that starts at zero in
    both (a fresh head) may move. Where a whole row of a sparse weight is zero and its bias, too,
    the bias stays zero.

    Args:
        pruned: The network as pruning left it.
        dense: The network before.
        sparse: Names of weights all of whose zeros stay, whatever the dense ones are.
    """
    before, held = dict(dense.named_parameters()), dict(pruned.named_parameters())
    found: dict[str, Tensor] = {}
    for name, weight in held.items():
        old, zero = before.get(name), weight.detach() == 0
        if name not in sparse:
            if weight.ndim < 2 or old is None or old.shape != weight.shape:
                continue
            if not bool((zero & (old.detach() != 0)).any()):
                continue
        if bool(zero.any()):
            found[name] = zero
            bias_name = f"{name.removesuffix('weight')}bias"
            bias = held.get(bias_name)
            if bias is not None and bias.shape == weight.shape[:1]:
                found[bias_name] = zero.flatten(1).all(dim=1) & (bias.detach() == 0)
    return {name: zero for name, zero in found.items() if bool(zero.any())}


@dataclass(frozen=True)
class Kept:
    """Puts zeros back where they have to stay.

    Attributes:
        masks: Weights, and where they are zero.
    """

    masks: tuple[tuple[nn.Parameter, Tensor], ...]

    @torch.no_grad()
    def __call__(self) -> None:
        """Zero the weights, after a step."""
        for weight, zero in self.masks:
            weight.masked_fill_(zero, 0)

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Zero their gradients, before these are clipped: what can't move must not count."""
        for weight, zero in self.masks:
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0)


def zeros_kept(pruned: nn.Module, dense: nn.Module, sparse: Collection[str] = ()) -> Kept | None:
    """What puts the zeros back that pruning has made, to be called after every step of a training.

    Args:
        pruned: The network that is going to be trained, as pruning left it.
        dense: The network before.
        sparse: Names of weights all of whose zeros stay.

    Returns:
        None if there is nothing to keep.
    """
    masks = tuple((pruned.get_parameter(name), zero) for name, zero in kept_zeros(pruned, dense, sparse).items())
    return Kept(masks) if masks else None
