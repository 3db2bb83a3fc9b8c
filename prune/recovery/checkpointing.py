"""Gradient checkpointing: a block's activations are computed again on the way back instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from models.base import PrunableModel
from utils.errors import InputError
from utils.hooks import replaying


@contextmanager
def checkpointed(model: PrunableModel) -> Iterator[None]:
    """Let every block of a model keep its inputs alone for the time of a `with`.

    Gradients are the same; random draws such as dropout are repeated as they were.

    Raises:
        InputError: If the model has no blocks.
    """
    if not model.blocks():
        raise InputError(f"recover.grad_checkpointing=true: model={model.name} has no blocks; must be false")
    forwards = {name: model.network.get_submodule(name).forward for name in model.blocks()}
    with replaying(model.network, {name: partial(_again, forward) for name, forward in forwards.items()}):
        yield


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
