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


def without_units(consumer: nn.Module, read: Tensor, gave: Tensor, group: UnitGroup, units: Sequence[int]) -> Tensor:
    """What a consumer gives when one unit is masked, for several units stacked along the batch.

    Masking a unit takes its own part from the sum: `y - W_u x_u`, without the product with all
    the others.

    Args:
        consumer: The linear or convolution that reads the units.
        read: Its dense input.
        gave: Its dense output.
        group: The unit group.
        units: Candidates, C of them.

    Returns:
        (C * B, ...), shaped as its output otherwise.
    """
    parts = []
    for unit in units:
        index = group.consumer.index[unit].to(read.device)
        taken = read.index_select(group.consumer.channel_axis, index)
        weight = consumer.weight.index_select(group.consumer.weight_dim, index)  # type: ignore[arg-type]
        if isinstance(consumer, nn.Conv2d):
            settings = (consumer.stride, consumer.padding, consumer.dilation)
            part = conv2d(taken.to(weight.dtype), weight, None, *settings)  # type: ignore[arg-type]
        else:
            part = taken.to(weight.dtype) @ weight.T
        # where passes run in less than the weights' precision, a small part would be rounded away
        parts.append(gave.to(weight.dtype) - part)
    return torch.cat(parts)


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
