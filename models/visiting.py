"""Models larger than the device: blocks lie in main memory, and come to the device for their own forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from models.base import PrunableModel
from models.recast import recast


def settle(model: PrunableModel, device: torch.device, visiting: bool = False) -> None:
    """Move a model to a device, in place; or only what lies outside its blocks, which visit from now on.

    Names, tensors and copies stay what they were; `model.device` says where inputs go.

    Args:
        model: The model.
        device: Where it computes.
        visiting: Keep the blocks in main memory. A model whose blocks visit stays one of that kind.
    """
    if not visiting and model.visited is None:
        model.network.to(device)
        return
    for name in model.blocks() if model.visited is None else ():
        block = model.network.get_submodule(name)
        model.network.set_submodule(name, recast(block, visiting_kind(type(block)), visits=device))
    model.visited = device
    move_all_but_blocks(model, device)


def move_all_but_blocks(model: PrunableModel, device: torch.device) -> None:
    """Move everything outside the blocks to a device, and the blocks to main memory; in place."""
    inside = {id(module) for name in model.blocks() for module in model.network.get_submodule(name).modules()}
    for module in model.network.modules():
        target = torch.device("cpu") if id(module) in inside else device
        for parameter in module.parameters(recurse=False):
            if parameter.device != target:
                parameter.data = parameter.data.to(target)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(target))


@contextmanager
def visit(module: nn.Module, device: torch.device, bring_back: bool = False) -> Iterator[None]:
    """Let a module's tensors stand on a device for the time of a `with`; those at home stay where they are.

    Args:
        module: What visits; what is on the device already stays there.
        device: Where to.
        bring_back: Write what was changed on the device into the tensors at home.
    """
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    home: list[tuple[Any, str, Tensor]] = [
        (table, n, t) for table in tables for n, t in table.items() if t is not None and t.device != device
    ]
    try:
        for table, name, tensor in home:
            table[name] = tensor.to(device)
        yield
    finally:
        for table, name, tensor in home:
            if bring_back:
                tensor.data.copy_(table[name])  # type: ignore[arg-type]
            table[name] = tensor


@cache
def visiting_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A block whose own forward brings its tensors to the device, and lets them go afterwards."""

    class Visiting(kind):
        visits: torch.device

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with visit(self, self.visits):
                return super().forward(*args, **kwargs)

    return Visiting
