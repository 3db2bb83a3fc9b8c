"""Forward passes of all calibration batches side by side, which wait at every consumer until all have come there.

Each batch runs the model's own forward once, in a thread of its own, and stops where the consumer's output is first
used: by then it is known what it is added to (the residual stream), and the output can still be replaced. Only one
thread runs at a time, so nothing depends on their order. What a forward holds at its stop, and what the consumer read
and gave, is held for all batches at once. What the blocks of a network that merges tokens tell each other goes with
its thread.

Nothing here knows an architecture: a residual is whatever an addition adds to the output, behind views and scalings.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import Batch, PrunableModel
from models.merging_flow import merging_flow
from utils.errors import InputError, RunError
from utils.hooks import hooked

# views that are not marked as such
VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)
ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
SCALINGS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)


@dataclass
class Stop:
    """A consumer whose output waits to be used.

    Attributes:
        name: The consumer.
        inputs: What it read.
        output: What it gave; shaped as the residual.
        residual: What its scaled output is about to be added to; None where nothing is.
        scale: What it was multiplied by on the way, broadcast along the last dimension; None for one.
        root: What holds the scaled output: written to, it replaces the output for all that follows.
        source: Which of its tokens each of the first tokens is part of, (B, T); None where none was merged.
    """

    name: str
    inputs: Tensor
    output: Tensor
    root: Tensor
    residual: Tensor | None = None
    scale: Tensor | None = None
    source: Tensor | None = None

    def replace(self, output: Tensor) -> None:
        """Let the forward go on with another output of the consumer."""
        self.root.copy_(output if self.scale is None else output * self.scale)


class _Left(Exception):
    """Ends a forward that is not wanted any more."""


class Stream(threading.Thread):
    """One batch's forward, which stops at every consumer.

    Args:
        model: Its consumers must carry the hooks of `stopping`.
        batch: In main memory.
    """

    def __init__(self, model: PrunableModel, batch: Batch) -> None:
        super().__init__(daemon=True)
        self.model, self.batch = model, batch
        self.flow, self.carried = merging_flow(model), None
        self.turn, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.pending: Stop | None = None
        self.leaving, self.ended = False, False
        self.error: BaseException | None = None

    def advance(self) -> Stop | None:
        """Run to the next consumer; None at the end of the forward."""
        self.pending = None
        self._hand_over()
        if self.error is not None:
            raise self.error
        if self.pending is not None and self.carried is not None:
            self.pending.source = self.carried["source"]
        return self.pending

    def leave(self) -> None:
        """End the thread wherever it stands."""
        self.leaving = True
        if self.is_alive():
            self._hand_over()
            self.join()

    def run(self) -> None:
        """Run the model's own forward; called by the thread itself."""
        self.turn.acquire()
        try:
            if not self.leaving:
                with torch.no_grad(), _Uses(self):
                    self.model.logits(self.model.place(self.batch))
                self.settle()
        except _Left:
            pass
        except BaseException as error:
            self.error = error
        self.pending, self.ended = None, True
        self.stopped.release()

    def came_to(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Take note of a consumer that has run; one still waiting is used by nothing that could be seen."""
        self.settle()
        self.pending = Stop(name, inputs, output, root=output)

    def settle(self) -> None:
        """Wait, if a consumer's output is pending, until it may be used."""
        if self.pending is None:
            return
        self.stopped.release()
        self.turn.acquire()
        self.pending = None
        if self.leaving:
            raise _Left

    def _hand_over(self) -> None:
        if self.ended:
            return
        if self.ident is None:
            self.start()
        if self.flow is not None:
            self.flow.resume(self.carried)
        self.turn.release()
        self.stopped.acquire()
        if self.flow is not None:
            self.carried = self.flow.held()


class _Uses(TorchDispatchMode):
    """Watches for the first use of a pending output."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, after the stop if it is the one that uses the output."""
        stop, kwargs = self.stream.pending, kwargs or {}
        if stop is None or not any(_holds(value, stop.root) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func in SCALINGS and (factor := _factor(args, stop)) is not None:
            result = func(*args, **kwargs)
            stop.scale = factor if stop.scale is None else stop.scale * factor
            stop.root = result.view(stop.output.shape)
            return result
        if func in ADDITIONS and not kwargs:
            stop.residual = _other(args, stop)
        elif func.is_view or func in VIEWS:
            return func(*args, **kwargs)
        self.stream.settle()
        return func(*args, **kwargs)


def _holds(value: Any, root: Tensor) -> bool:
    """Whether an argument is a tensor, or a list with one, on the root's memory."""
    if isinstance(value, list | tuple):
        return any(_holds(part, root) for part in value)
    return isinstance(value, Tensor) and _memory(value) == _memory(root)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(tensor: Tensor, root: Tensor) -> bool:
    """Whether a tensor is all of the root, in its order."""
    return tensor.numel() == root.numel() and tensor.is_contiguous() and root.is_contiguous()


def _factor(args: Sequence[Any], stop: Stop) -> Tensor | None:
    """What an output is multiplied by, if that is one number a feature; the features are the last dimension."""
    first, second = args[:2]
    mine, other = (first, second) if _holds(first, stop.root) else (second, first)
    if isinstance(other, int | float):
        return stop.root.new_tensor([other])
    if not isinstance(other, Tensor) or _holds(other, stop.root) or not _whole(mine, stop.root):
        return None
    if mine.shape != stop.output.shape or other.numel() not in (1, mine.shape[-1]) or other.shape[-1:] == (0,):
        return None
    last = other.ndim == 0 or other.numel() == 1 or other.shape[-1] == mine.shape[-1]
    return other.flatten() if last and mine.ndim != 4 else None


def _other(args: Sequence[Any], stop: Stop) -> Tensor | None:
    """What an output is added to, if that has its shape."""
    first, second = args[:2]
    mine, other = (first, second) if _holds(first, stop.root) else (second, first)
    if not isinstance(other, Tensor) or _holds(other, stop.root) or not _whole(mine, stop.root):
        return None
    # a view of the output keeps the order of its elements, and what it is added to has the view's shape
    return other.reshape(stop.output.shape) if other.shape == mine.shape else None


@contextmanager
def streams(
    model: PrunableModel, consumers: Sequence[str], batches: Sequence[Batch], inputs: bool = True
) -> Iterator[list[Stream]]:
    """One stream a batch; every thread has ended after the block, whatever happens.

    Args:
        model: In eval mode; its weights may change between stops.
        consumers: Where to stop.
        batches: Of valid samples and padding.
        inputs: Hold what consumers read; without, stops have none of it, and take less memory.
    """
    found, flow = [Stream(model, batch) for batch in batches], merging_flow(model)
    hooks = [(model.network.get_submodule(name), _arrival(name, inputs)) for name in consumers]
    # behind the last block nothing is wanted, and the head of a language model is dear
    ends = [(model.network.get_submodule(name), _end) for name in _last_block(model, consumers)]
    with hooked(after=hooks), hooked(after=ends):
        try:
            if flow is not None:
                flow.tracked = True
            yield found
        finally:
            for stream in found:
                stream.leave()
            if flow is not None:
                flow.tracked = False
                flow.resume(None)


def _last_block(model: PrunableModel, consumers: Sequence[str]) -> Sequence[str]:
    """The last block, if all consumers lie in blocks that follow each other."""
    blocks = model.blocks() if model.chained else ()
    inside = all(any(name.startswith(f"{block}.") for block in blocks) for name in consumers)
    return blocks[-1:] if inside else ()


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    current = threading.current_thread()
    if isinstance(current, Stream):
        current.settle()
        raise _Left


def _arrival(name: str, inputs: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        current = threading.current_thread()
        if isinstance(current, Stream):
            current.came_to(name, args[0] if inputs else output.new_zeros(0), output)

    return hook


def advance_all(running: Sequence[Stream], seen: Mapping[str, object]) -> tuple[str, list[Stop]] | None:
    """Bring all streams to the next consumer; None at the end.

    Args:
        running: Of one model.
        seen: Consumers that were reached before.

    Raises:
        InputError: If a consumer runs more than once.
        RunError: If batches take different ways.
    """
    stops = [stream.advance() for stream in running]
    names = {stop.name if stop is not None else None for stop in stops}
    if len(names) > 1:
        raise RunError(f"batches reach different consumers: {', '.join(sorted(map(str, names)))}")
    name = names.pop()
    if name is None:
        return None
    if name in seen:
        raise InputError(f"{name} runs more than once in a forward pass; its weights can't be repaired")
    return name, [stop for stop in stops if stop is not None]
