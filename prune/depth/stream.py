"""One calibration pass that holds what enters each block against what leaves it.

Inputs and outputs of the blocks themselves are read: transformers' `hidden_states` end behind the
final norm, which is no block's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.depth.scores import cosines, last_tokens, window_distances
from prune.passes import in_fitting_batches, states_of, watch_calibration
from prune.weights.statistics import tokens_of
from utils.distributed import summed
from utils.errors import InputError
from utils.hooks import Hook


def block_influence(model: PrunableModel, data: DataBundle) -> Tensor:
    """`1 - mean cosine` of every block's input and output over all real tokens (Men et al., 2024, arXiv:2403.03853).

    Returns:
        (L,), float32, CPU; 0 for a block that turns nothing.
    """

    def watched(data: DataBundle) -> _Influence:
        watch = _Influence(model)
        watch_calibration(model, data, "block influence", watch.start, watch.before(), watch.after(), True)
        return watch

    watch = in_fitting_batches(data, "block influence", watched)
    found = summed({"sums": watch.sums, "tokens": watch.tokens})
    return (found["sums"] / found["tokens"]).float()


def angular_distances(model: PrunableModel, data: DataBundle) -> dict[int, Tensor]:
    """Mean angular distance of every window of blocks at each sample's last real token.

    Returns:
        Per number of blocks n from 1 to L - 1, (L - n + 1,), float32, CPU.
    """

    def watched(data: DataBundle) -> _LastStates:
        watch = _LastStates(model)
        watch_calibration(model, data, "angular distance", watch.start, watch.before(), watch.after(), True)
        watch.finish()
        return watch

    watch = in_fitting_batches(data, "angular distance", watched)
    return {size: means.float() for size, means in watch.means().items()}


class _Watch:
    """Hooks on the inputs and outputs of all blocks."""

    def __init__(self, model: PrunableModel) -> None:
        self.blocks = model.blocks()
        self.modules = [model.network.get_submodule(name) for name in self.blocks]
        self.axis = model.feature_axis
        self.batch: Batch = {}
        self.entered = torch.zeros(())

    def start(self, batch: Batch) -> None:
        """Begin a batch."""
        self.batch = batch

    def before(self) -> list[Hook]:
        """Hooks that see what enters."""
        return [(module, self._enters(at)) for at, module in enumerate(self.modules)]

    def after(self) -> list[Hook]:
        """Hooks that see what leaves."""
        return [(module, self._leaves(at)) for at, module in enumerate(self.modules)]

    def _enters(self, at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.entered = args[0]
            self.enter(at)

        return hook

    def _leaves(self, at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            left = states_of(output)
            if left.shape != self.entered.shape:
                shapes = f"{tuple(self.entered.shape)} to {tuple(left.shape)}"
                raise InputError(f"{self.blocks[at]}: maps {shapes}; only a block that keeps the shape can be removed")
            self.leave(at, left)

        return hook

    def features_last(self, states: Tensor) -> Tensor:
        """The stream with its features on the last axis, (B, ..., D)."""
        return states.movedim(self.axis, -1) if states.ndim == 4 else states

    def enter(self, at: int) -> None:
        """Take in `entered`, what enters a block."""

    def leave(self, at: int, left: Tensor) -> None:
        """Take in what leaves a block."""


class _Influence(_Watch):
    """Sums of `1 - cosine` a block, and the tokens in them."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__(model)
        self.sums = torch.zeros(len(self.blocks), dtype=torch.float64)
        # by block, as stages differ in their number
        self.tokens = torch.zeros(len(self.blocks), dtype=torch.int64)

    def leave(self, at: int, left: Tensor) -> None:
        rows = (tokens_of(self.features_last(states), self.batch) for states in (self.entered, left))
        found = cosines(*rows, where=self.blocks[at])
        self.sums[at] += float((1 - found).double().sum())
        self.tokens[at] += len(found)


class _LastStates(_Watch):
    """The stream at each sample's last token, and the sums of its distances."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__(model)
        self.sums: dict[int, Tensor] = {}
        self.samples = 0
        self.stream: list[Tensor] = []

    def start(self, batch: Batch) -> None:
        self.finish()
        super().start(batch)

    def enter(self, at: int) -> None:
        if self.entered.ndim != 3 or self.stream and self.stream[0].shape[1] != self.entered.shape[-1]:
            raise InputError(
                f"prune.score=angular_window: compares last tokens across blocks, {self.blocks[at]} gets "
                f"{tuple(self.entered.shape)}; maps and stages of other widths need prune.score=block_influence"
            )
        self.stream.append(self._last(self.entered))

    def leave(self, at: int, left: Tensor) -> None:
        if at == len(self.blocks) - 1:
            self.stream.append(self._last(left))

    def finish(self) -> None:
        """Take in the batch before."""
        if self.stream:
            for size, sums in window_distances(torch.stack(self.stream)).items():
                self.sums[size] = self.sums.get(size, torch.zeros_like(sums)) + sums
            self.samples += len(self.stream[0])
        self.stream = []

    def means(self) -> dict[int, Tensor]:
        """Mean distance of every window, over the batches of all processes."""
        windows = {size: len(self.blocks) - size + 1 for size in range(1, len(self.blocks))}
        nothing = {size: torch.zeros(count, dtype=torch.float64) for size, count in windows.items()}
        own = {str(size): self.sums.get(size, nothing[size]) for size in windows}
        found = summed({**own, "samples": torch.tensor(self.samples)})
        return {size: found[str(size)] / found["samples"] for size in windows}

    def _last(self, states: Tensor) -> Tensor:
        at = last_tokens(self.batch, states)
        return states[torch.arange(len(states), device=states.device), at].float()  # (B, T, D) -> (B, D)
