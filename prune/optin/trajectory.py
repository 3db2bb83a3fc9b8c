"""The dense model's trajectory on one calibration batch, and running only what a masked unit changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from models.base import Batch, PrunableModel, UnitGroup
from utils.hooks import hooked, replaying


def tiled(value: Any, times: int) -> Any:
    """Repeat tensors along the batch, candidate-major; other values stay."""
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1)) if value.ndim else value
    if isinstance(value, tuple):
        return tuple(tiled(part, times) for part in value)
    return value


def always(value: Any) -> Callable[..., Any]:
    """A function that answers the same to everything."""
    return lambda *args, **kwargs: value


@dataclass(frozen=True)
class Recorded:
    """One call of a module.

    Attributes:
        name: Dotted name.
        inputs: Its positional arguments.
        output: What it gave.
    """

    name: str
    inputs: tuple[Any, ...]
    output: Any


def block_calls(
    model: PrunableModel, batch: Batch, prefix: Mapping[str, Callable[..., Any]], block: str
) -> list[Recorded]:
    """Run one block on what the blocks before it gave, and record its modules' calls in order."""
    calls: list[Recorded] = []

    class Enough(Exception):
        """Ends the pass behind the block."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.append(Recorded(name, args, output))
            if name == block:
                raise Enough

        return hook

    inside = [(n, m) for n, m in model.network.named_modules() if n == block or n.startswith(f"{block}.")]
    with replaying(model.network, prefix), hooked(after=[(m, hook_of(n)) for n, m in inside]):
        try:
            model.logits(batch)
        except Enough:
            pass
    return calls


def embedding_calls(model: PrunableModel, batch: Batch) -> list[Recorded]:
    """Run a model up to its first block, and record the outermost calls of the modules before it."""
    calls: list[Recorded] = []

    class Enough(Exception):
        """Ends the pass at the block."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Enough

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls.append(Recorded(name, args, output))

    first = model.blocks()[0]
    outside = [(n, m) for n, m in model.network.named_modules() if n and not f"{first}.".startswith(f"{n}.")]
    stops = [(model.network.get_submodule(first), stop)]
    with hooked(before=stops, after=[(m, hook_of(n)) for n, m in outside]):
        try:
            model.logits(batch)
        except Enough:
            pass
    return _outermost(calls)


def without_units(consumer: nn.Module, read: Tensor, gave: Tensor, group: UnitGroup, index: Tensor) -> Tensor:
    """What a consumer gives when one unit is masked, for several units stacked along the batch.

    Masking a unit takes its own part from the sum: `y - W_u x_u`, without the product with all
    the others. Nothing waits for the device.

    Args:
        consumer: The linear or convolution that reads the units.
        read: Its dense input.
        gave: Its dense output.
        group: The unit group.
        index: Input positions of the candidates, (C, width), on the device.

    Returns:
        (C * B, ...), shaped as its output otherwise.
    """
    weight: Tensor = consumer.weight  # type: ignore[assignment]
    # where passes run in less than the weights' precision, a small part would be rounded away
    read, gave = read.to(weight.dtype), gave.to(weight.dtype)
    if isinstance(consumer, nn.Conv2d):
        return torch.cat([gave - _part_of_convolution(consumer, read, group, unit) for unit in index])
    taken = read.index_select(-1, index.flatten()).unflatten(-1, index.shape).movedim(-2, 0)  # (C, B, ..., width)
    columns = weight.index_select(group.consumer.weight_dim, index.flatten())
    if group.consumer.weight_dim == 1:
        columns = columns.T
    columns = columns.unflatten(0, index.shape)  # (C, width, out)
    dense = gave.flatten(0, -2).expand(len(index), -1, -1)  # (C, positions, out)
    changed = torch.baddbmm(dense, taken.flatten(1, -2), columns, alpha=-1)
    return changed.view(-1, *gave.shape[1:])  # (C, positions, out) -> (C * B, ..., out)


def _part_of_convolution(conv: nn.Conv2d, read: Tensor, group: UnitGroup, index: Tensor) -> Tensor:
    taken = read.index_select(group.consumer.channel_axis, index)
    weight = conv.weight.index_select(group.consumer.weight_dim, index)
    return conv2d(taken, weight, None, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]


def reusable(calls: Sequence[Recorded], consumer: str) -> list[Recorded]:
    """The calls of a block that need not run again when only the consumer's output changes.

    Modules that ran before the consumer and do not hold it; of nested ones the outermost.
    """
    names = [call.name for call in calls]
    before = calls[: names.index(consumer)]
    return _outermost([call for call in before if not consumer.startswith(f"{call.name}.")], names)


def _outermost(calls: Sequence[Recorded], every: Sequence[str] | None = None) -> list[Recorded]:
    """Calls of modules that ran once and lie in no other of them."""
    names = [call.name for call in calls] if every is None else every
    once = [call for call in calls if names.count(call.name) == 1]
    return [call for call in once if not any(call.name.startswith(f"{other.name}.") for other in once)]
