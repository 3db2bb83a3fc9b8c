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
from prune.passes import states_of, watch_calibration
from prune.weights.statistics import tokens_of
from utils.errors import InputError
from utils.hooks import Hook


def block_influence(model: PrunableModel, data: DataBundle) -> Tensor:
    """`1 - mean cosine` of every block's input and output over all real tokens (Men et al., 2024, arXiv:2403.03853).

    Returns:
        (L,), float32, CPU; 0 for a block that turns nothing.
    """
    watch = _Influence(model)
    watch_calibration(model, data, "block influence", watch.start, watch.before(), watch.after())
    return (watch.sums / watch.tokens).float()


def angular_distances(model: PrunableModel, data: DataBundle) -> dict[int, Tensor]:
    """Mean angular distance of every window of blocks at each sample's last real token.

    Returns:
        Per number of blocks n from 1 to L - 1, (L - n + 1,), float32, CPU.
    """
    watch = _LastStates(model)
    watch_calibration(model, data, "angular distance", watch.start, watch.before(), watch.after())
    watch.finish()
    return {size: (sums / watch.samples).float() for size, sums in watch.sums.items()}


class _Watch:
    """Hooks on the inputs and outputs of all blocks."""

    def __init__(self, model: PrunableModel) -> None:
        self.blocks = model.blocks()
        self.modules = [model.network.get_submodule(name) for name in self.blocks]
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

    def enter(self, at: int) -> None:
        """Take in `entered`, what enters a block."""

    def leave(self, at: int, left: Tensor) -> None:
        """Take in what leaves a block."""


class _Influence(_Watch):
    """Sums of `1 - cosine` a block, and the tokens in them."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__(model)
        self.sums = torch.zeros(len(self.blocks), dtype=torch.float64)
        self.tokens = 0

    def leave(self, at: int, left: Tensor) -> None:
        rows = (tokens_of(states, self.batch) for states in (self.entered, left))
        found = cosines(*rows, where=self.blocks[at])
        self.sums[at] += float((1 - found).double().sum())
        self.tokens += len(found) if at == 0 else 0


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

    def _last(self, states: Tensor) -> Tensor:
        at = last_tokens(self.batch, states)
        return states[torch.arange(len(states), device=states.device), at].float()  # (B, T, D) -> (B, D)
