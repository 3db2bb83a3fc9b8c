"""Biases for modules whose family has none: something that its own library can't express."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from models.base import PrunableModel


def add_biases(model: PrunableModel, names: Iterable[str]) -> None:
    """Give linears and convolutions a bias of zeros, in place; those that have one keep it.

    Args:
        model: Remembers that it was done, so that it is saved and built again with them.
        names: Dotted names of the modules.

    Raises:
        ValueError: If a module has no place for a bias.
    """
    for name in names:
        module: Any = model.network.get_submodule(name)
        if getattr(module, "bias", None) is not None:
            continue
        if not hasattr(module, "bias"):
            raise ValueError(f"{name} is a {type(module).__name__} and has no place for a bias")
        weight = module.weight
        zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        model.biased = True


def missing_biases(model: PrunableModel, names: Iterable[str]) -> list[str]:
    """Modules of a model without a bias, where a checkpoint with tensors of these names has one."""
    modules = dict(model.network.named_modules())
    found = [name.removesuffix(".bias") for name in names if name.endswith(".bias")]
    return [n for n in found if n in modules and getattr(modules[n], "bias", 0) is None]
