"""Measuring a changed model from the changed block on: what came before answers from memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.base import Task
from models.base import Batch, PrunableModel
from utils.hooks import hooked, replaying


@dataclass(frozen=True)
class Figures:
    """What a model's answers are worth on the batches, averaged over samples.

    Attributes:
        loss: The task's.
        divergence: KL of the dense model's answers to them; 0 for the dense model.
        quality: The task's first figure a sample, such as accuracy; None where it has none.
    """

    loss: float
    divergence: float
    quality: float | None


class _Enough(Exception):
    """Ends a forward pass that has given what was wanted."""


class SuffixPasses:
    """Runs a model on the same batches again and again; blocks before the current one never run.

    Args:
        model: The dense model, in eval mode; changes are made around `measure`.
        batches: What it answers.
        task: How answers are scored.
    """

    def __init__(self, model: PrunableModel, batches: Sequence[Batch], task: Task) -> None:
        self.model, self.task = model, task
        self.batches = [model.place(batch) for batch in batches]
        # a schedule of tokens is kept outside of blocks: such a model runs as a whole
        self.blocks = model.blocks() if model.reduction is None else ()
        self.layer = 0
        self.outputs: list[Any] = [None] * len(self.batches)
        self.blanks: list[list[Any]] = []
        with torch.inference_mode():
            self.logits = [model.logits(batch).float() for batch in self.batches]
        self.dense = self.measure()

    @torch.inference_mode()
    def measure(self) -> Figures:
        """Figures of the model as it is now, of which only the current block and later ones may have changed."""
        sums, samples = {"loss": 0.0, "divergence": 0.0, "quality": 0.0}, 0
        has_quality = True
        for number, batch in enumerate(self.batches):
            with replaying(self.model.network, self._answers(number)):
                logits = self.model.logits(batch)
            count = len(next(iter(batch.values())))
            sums["loss"] += float(self.task.loss(logits, batch)) * count
            sums["divergence"] += float(self.task.deviation(logits.float(), self.logits[number], batch).sum())
            figures = self.task.quality(logits, batch)
            has_quality = has_quality and bool(figures)
            sums["quality"] += float(next(iter(figures.values())).sum()) if figures else 0.0
            samples += count
        means = {name: total / samples for name, total in sums.items()}
        return Figures(means["loss"], means["divergence"], means["quality"] if has_quality else None)

    @torch.inference_mode()
    def go_to(self, layer: int) -> None:
        """Finish the unchanged blocks before this one; there is no way back."""
        while self.layer < min(layer, len(self.blocks)):
            module = self.model.network.get_submodule(self.blocks[self.layer])
            given = [self._through(number, module) for number in range(len(self.batches))]
            self.outputs = given
            self.blanks.append([_blank(output) for output in given])
            self.layer += 1

    def _through(self, number: int, block: nn.Module) -> Any:
        found: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _Enough

        with replaying(self.model.network, self._answers(number)), hooked(after=[(block, stop)]):
            try:
                self.model.logits(self.batches[number])
            except _Enough:
                pass
        return found[0]

    def _answers(self, number: int) -> Mapping[str, Callable[..., Any]]:
        """Only the last block's output is read; the others answer with something of their shape."""
        given = [*(blanks[number] for blanks in self.blanks[:-1]), self.outputs[number]][: self.layer]
        return {name: _always(output) for name, output in zip(self.blocks, given, strict=False)}


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _blank(output: Any) -> Any:
    """Something of the same shape that takes no memory."""
    if isinstance(output, Tensor):
        return output.new_zeros(()).expand(output.shape)
    return type(output)(map(_blank, output)) if isinstance(output, tuple | list) else output


@contextmanager
def zeroed(weight: Tensor, mask: Tensor) -> Iterator[None]:
    """Set some entries of a weight to zero for the time of a `with`.

    Args:
        weight: Changed in place and put back.
        mask: Of its shape, bool; True is zeroed.
    """
    with torch.no_grad():
        before = weight.detach().clone()
        weight.masked_fill_(mask.to(weight.device), 0)
        try:
            yield
        finally:
            weight.copy_(before)
