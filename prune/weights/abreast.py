"""All calibration batches through one block abreast: one forward pass for statistics and outputs.

Each batch runs the model's own forward in a thread of its own, and waits in front of the first
linear of every stage until all batches have come there; then the stage is pruned, and they go
on through what is left. Only one thread runs at a time, so nothing depends on their order. What
a forward holds at its stops is held for all batches at once.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune.weights.products import quick_linears
from prune.weights.statistics import Statistic, tokens_of
from prune.weights.walk import Enough, MakeStatistic, Walk
from utils.errors import RunError
from utils.hooks import hooked, replaying

Stages = Mapping[str, tuple[str, ...]]


def staged(
    walk: Walk, layer: int, names: Sequence[str], make: MakeStatistic, last: bool
) -> Iterator[tuple[tuple[str, ...], Statistic]]:
    """Stop at every stage of a block with what its linears read; to be pruned before going on.

    Args:
        walk: The data on its way; all blocks before must be finished.
        layer: The block.
        names: Its linears.
        make: Starts a statistic.
        last: Whether nothing is wanted behind the last stage; else the block is finished in the end.

    Yields:
        Linears that read the very same tensor, with their common statistic, in order of execution.
    """
    stages: Stages = {stage[0]: stage for stage in walk.sharing(layer, names)}
    sums = {leader: make() for leader in stages}
    runners = [_Runner(walk, number, sums) for number in range(len(walk.batches))]
    with _hooks(walk, layer, stages):
        try:
            for leader, stage in stages.items():
                for runner in runners:
                    runner.go_on_to(leader)
                yield stage, sums[leader]
            for runner in runners if not last else ():
                runner.go_on_to(None)
        finally:
            for runner in runners:
                runner.leave()
    if not last:
        walk.note_shapes()


class _Runner(threading.Thread):
    """One batch's forward pass, which stops in front of every stage."""

    def __init__(self, walk: Walk, number: int, sums: Mapping[str, Statistic]) -> None:
        super().__init__(daemon=True)
        self.walk, self.number, self.sums = walk, number, sums
        self.turn, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.at: str | None = None
        self.leaving = False
        self.error: BaseException | None = None

    def go_on_to(self, leader: str | None) -> None:
        """Run until it stands in front of a linear, or is through with the block (None)."""
        self._hand_over()
        if self.error is not None:
            raise self.error
        if self.at != leader:
            raise RunError(f"{leader or 'the end of the block'}: batch {self.number} came to {self.at} instead")

    def leave(self) -> None:
        """End the thread wherever it stands."""
        self.leaving = True
        if self.is_alive():
            self._hand_over()
            self.join()

    def stop_at(self, name: str, inputs: Tensor) -> None:
        """Add up what a linear reads, and wait; called by the thread itself."""
        batch = self.walk.batches[self.number]
        self.sums[name].add(tokens_of(inputs, batch), len(next(iter(batch.values()))))
        self.at, self.inputs = name, inputs
        self.stopped.release()
        self.turn.acquire()
        if self.leaving:
            raise Enough

    def follow(self, name: str, inputs: Tensor) -> None:
        """Make sure that a linear reads what the first of its stage has read."""
        if inputs is not self.inputs:
            raise RunError(
                f"{name} reads something else than {self.at}, unlike in other blocks; use another prune.schedule"
            )

    def run(self) -> None:
        """Run the model's own forward."""
        self.turn.acquire()
        try:
            if not self.leaving:
                with torch.no_grad():
                    self.walk.forward(self.walk.placed(self.number))
        except Enough:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self.stopped.release()

    def _hand_over(self) -> None:
        if self.ident is None:
            self.start()
        self.turn.release()
        self.stopped.acquire()


@contextmanager
def _hooks(walk: Walk, layer: int, stages: Stages) -> Iterator[None]:
    """Answers of the blocks before, stops at every stage, and the end behind the block; by thread."""

    def runner() -> _Runner:
        current = threading.current_thread()
        assert isinstance(current, _Runner)
        return current

    def stop(name: str) -> Any:
        return lambda module, args: runner().stop_at(name, args[0])

    def follow(name: str) -> Any:
        return lambda module, args: runner().follow(name, args[0])

    def reached(module: nn.Module, args: Any, output: Any) -> None:
        walk.outputs[runner().number] = output
        raise Enough

    answers = {
        walk.blocks[i]: lambda *args, i=i, **kwargs: walk.answer(i, layer, runner().number) for i in range(layer)
    }
    network = walk.model.network
    answers |= quick_linears(network, walk.blocks[layer])
    before = [(network.get_submodule(name), stop(name)) for name in stages]
    before += [(network.get_submodule(name), follow(name)) for stage in stages.values() for name in stage[1:]]
    with replaying(network, answers), hooked(before, [(network.get_submodule(walk.blocks[layer]), reached)]):
        yield
