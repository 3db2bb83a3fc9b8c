"""The dense model's trajectory on one calibration batch, and running only what a masked unit changes."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
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
    if isinstance(value, list):
        return [tiled(part, times) for part in value]
    if is_dataclass(value) and not isinstance(value, type):  # what transformers' modules give
        return replace(value, **{part.name: tiled(getattr(value, part.name), times) for part in fields(value)})
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

    # a module that is given nothing, such as a table of biases, answers the same to any number of candidates
    inside = [
        (n, m) for n, m in model.network.named_modules() if n == block or n.startswith(f"{block}.") and _is_given(m)
    ]
    with replaying(model.network, prefix), hooked(after=[(m, hook_of(n)) for n, m in inside]):
        try:
            model.logits(batch)
        except Enough:
            pass
    return calls


def _is_given(module: nn.Module) -> bool:
    return bool(inspect.signature(module.forward).parameters)


def calls_before(model: PrunableModel, batch: Batch, block: str) -> list[Recorded]:
    """Run a model once, and record the outermost calls of the modules that were done before a block began.

    A module that runs again later is left out: it can't be answered for by what it gave before.
    """
    calls: list[Recorded] = []
    times: Counter[str] = Counter()
    begun: list[bool] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            times[name] += 1
            if not begun:
                calls[:] = [call for call in calls if not call.name.startswith(f"{name}.")]
                calls.append(Recorded(name, args, output))

        return hook

    outside = [
        (n, m) for n, m in model.network.named_modules() if n and not f"{block}.".startswith(f"{n}.") and _is_given(m)
    ]
    start = (model.network.get_submodule(block), lambda module, args: begun.append(True))
    with hooked(before=[start], after=[(m, hook_of(n)) for n, m in outside]):
        model.logits(batch)
    return [call for call in calls if times[call.name] == 1]


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
    once = [call for call in before if not consumer.startswith(f"{call.name}.") and names.count(call.name) == 1]
    return [call for call in once if not any(call.name.startswith(f"{other.name}.") for other in once)]
