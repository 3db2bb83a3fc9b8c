"""Calibration data on its way through a model, one block after the other.

Every pass is the model's own forward: the blocks before the current one answer with what was
kept of them, and the pass ends as soon as the current one has given what is wanted. Masks,
rotary tables and whatever else lies between blocks therefore stay the model's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Batch, PrunableModel
from models.visiting import move_all_but_blocks, visit
from prune.optin.precision import Precision, computed_in
from prune.weights.products import quick_linears
from prune.weights.statistics import SquaredNorms, Statistic, tokens_of
from utils.errors import InputError, RunError
from utils.hooks import hooked, replaying

MakeStatistic = Callable[[], Statistic]


class Enough(Exception):
    """Ends a forward pass that has given what was wanted."""


class Walk:
    """Outputs of the last finished block for every calibration batch, and how to come further.

    Args:
        model: The model, whose weights may change between passes; not in training mode.
        batches: The calibration batches.
        device: Where to compute.
        offload: Keep only the current block there, the others in main memory.
        precision: What products are computed in where a pass takes statistics alone; what goes on is float32.
    """

    def __init__(
        self, model: PrunableModel, batches: Sequence[Batch], device: torch.device, offload: bool,
        precision: Precision = "float32",
    ) -> None:  # fmt: skip
        self.model, self.batches, self.device, self.offload = model, batches, device, offload
        self.precision: Precision = precision
        self.blocks = model.blocks()
        self.outputs: list[Any] = [None] * len(batches)
        # per block and batch, something of the shape that the block gave
        self._blanks: list[list[Any]] = []
        self._wiring: dict[tuple[type, tuple[str, ...]], list[tuple[str, ...]]] = {}
        if offload:
            move_all_but_blocks(model, device)

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep a block on the device for the time of a `with`."""
        block = self.model.network.get_submodule(self.blocks[layer])
        with visit(block, self.device, bring_back=True) if self.offload else nullcontext():
            yield

    @torch.no_grad()
    def statistics(
        self, layer: int, names: Sequence[str], make: MakeStatistic, first_stage: bool = False, go_on: bool = False
    ) -> list[tuple[tuple[str, ...], Statistic]]:
        """What the linears of a block read, over all batches.

        Args:
            layer: The block; all before it must be finished.
            names: Its linears.
            make: Starts a statistic.
            first_stage: Only for the first of them to run, and those that read the same.
            go_on: Finish the block with the weights as they are, in the same pass.

        Returns:
            Linears that read the very same tensor, with their common statistic, in order of execution.

        Raises:
            InputError: If a linear does not run exactly once.
        """
        watch = _Watch(make, first_stage, stop=not go_on)
        linears = [(self.model.network.get_submodule(name), watch.hook(name)) for name in names]
        with hooked(before=linears), self._up_to(layer, keep=go_on) as send:
            for number in range(len(self.batches)):
                watch.start(self.batches[number])
                send(number)
        if go_on:
            self.note_shapes()
        return watch.found(() if first_stage else names)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Finish a block with its weights as they are: every batch's output replaces that of the block before."""
        with self._up_to(layer, keep=True) as send:
            for number in range(len(self.batches)):
                send(number)
        self.note_shapes()

    @torch.no_grad()
    def sharing(self, layer: int, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Linears of a block that read the very same tensor, in order of execution.

        The first batch tells; blocks of one kind are taken to be wired alike.
        """
        block = self.blocks[layer]
        kind = (type(self.model.network.get_submodule(block)), tuple(name.removeprefix(block) for name in names))
        if kind not in self._wiring:
            self._wiring[kind] = self._shared(layer, names)
        return [tuple(f"{block}{name}" for name in stage) for stage in self._wiring[kind]]

    def _shared(self, layer: int, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The same from a pass of the first batch; names are relative to the block."""
        watch = _Watch(SquaredNorms, first_stage=False, stop=False)
        watch.start(self.batches[0])
        linears = [(self.model.network.get_submodule(name), watch.hook(name)) for name in names]
        with hooked(before=linears), self._up_to(layer, keep=False) as send:
            send(0)
        block = self.blocks[layer]
        return [tuple(name.removeprefix(block) for name in stage) for stage, _ in watch.found(names)]

    def answer(self, block: int, layer: int, number: int) -> Any:
        """What a block before the current one answers with: its output, or where that is not needed its shape."""
        return self.outputs[number] if block == layer - 1 else self._blanks[block][number]

    def note_shapes(self) -> None:
        """Remember the shapes of a finished block's outputs."""
        self._blanks.append([_blank(output) for output in self.outputs])

    def placed(self, number: int) -> Batch:
        """A calibration batch on the device."""
        return {name: tensor.to(self.device) for name, tensor in self.model.place(self.batches[number]).items()}

    def forward(self, batch: Batch, keep: bool = True) -> None:
        """Run the model's own forward on a batch on the device; a result that is kept is not rounded."""
        with computed_in("float32" if keep else self.precision, self.device):
            self.model.logits(batch)

    @contextmanager
    def _up_to(self, layer: int, keep: bool) -> Iterator[Callable[[int], None]]:
        """Sends batches through one block, by their numbers; an output that is kept is found in `outputs`."""
        network, current = self.model.network, 0

        def reached(module: nn.Module, args: Any, output: Any) -> None:
            if keep:
                self.outputs[current] = output
            raise Enough

        def answering(block: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.answer(block, layer, current)

        def send(number: int) -> None:
            nonlocal current
            current = number
            try:
                self.forward(self.placed(number), keep)
            except Enough:
                return
            raise InputError(f"model={self.model.name}: its forward does not call block {self.blocks[layer]}")

        answers = {self.blocks[i]: answering(i) for i in range(layer)} | quick_linears(network, self.blocks[layer])
        with replaying(network, answers), hooked(after=[(network.get_submodule(self.blocks[layer]), reached)]):
            yield send


class _Watch:
    """Adds up what linears read; those that read the same tensor share one sum."""

    def __init__(self, make: MakeStatistic, first_stage: bool, stop: bool) -> None:
        self.make, self.first_stage, self.stop = make, first_stage, stop
        self.sums: dict[str, Statistic] = {}
        self.leader: dict[str, str] = {}
        self.last: str | None = None
        self.first_batch = True

    def start(self, batch: Batch) -> None:
        """Begin a batch; after the first one it is known who reads the same."""
        self.first_batch, self.last = not self.sums, next(reversed(self.sums), None)
        self.batch, self.samples = batch, len(next(iter(batch.values())))
        self.called: set[str] = set()
        # inputs are kept until the pass ends, so that no other tensor takes their identity
        self.seen: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: self._read(name, args[0])

    def _read(self, name: str, inputs: Tensor) -> None:
        if name in self.called:
            raise InputError(f"{name} runs more than once in a forward pass; leave it out by prune.skip")
        owner = self.seen.get((id(inputs), inputs._version), (name, inputs))[0]
        if self.first_batch:
            if self.first_stage and self.seen and owner == name:
                raise Enough
            self.leader[name] = owner
        elif self.leader.get(name) != owner:
            raise RunError(f"{name} reads the same as {self.leader.get(name)} in one batch and not in another")
        self.called.add(name)
        if owner != name:
            return
        self.seen[id(inputs), inputs._version] = (name, inputs)
        if name not in self.sums:
            self.sums[name] = self.make()
        self.sums[name].add(tokens_of(inputs, self.batch), self.samples)
        if self.stop and name == self.last:
            raise Enough

    def found(self, names: Sequence[str]) -> list[tuple[tuple[str, ...], Statistic]]:
        if silent := [name for name in names if name not in self.leader]:
            raise InputError(f"{silent[0]} is never called in a forward pass; leave it out by prune.skip")
        groups = {owner: tuple(n for n, leader in self.leader.items() if leader == owner) for owner in self.sums}
        return [(group, self.sums[owner]) for owner, group in groups.items()]


def _blank(output: Any) -> Any:
    """Something of the same shape that takes no memory."""
    if isinstance(output, Tensor):
        return output.new_zeros(()).expand(output.shape)
    return type(output)(map(_blank, output)) if isinstance(output, tuple | list) else output
