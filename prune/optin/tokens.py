"""Exact OPTIN losses of token positions: one position dropped at a block's input, for good.

The token counts of both models then differ, so their features are compared by a Gram across
the samples of the batch, averaged over positions.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import PrunableModel
from prune.optin.candidates import Losses, Stacked, calls_of_block, candidates_at_once, compared, in_turns
from prune.optin.combine import Positions
from prune.optin.losses import token_gram
from prune.optin.teacher import Settings, Teacher, compared_points
from prune.optin.trajectory import always
from utils.distributed import Turns
from utils.errors import InputError
from utils.hooks import hooked, replaying
from utils.progress import Advance


def tokens_of(model: PrunableModel, layer: int) -> str:
    """Name under which the scores of a layer's token positions are kept."""
    return f"{model.blocks()[layer]}.tokens"


def positions_of(model: PrunableModel) -> list[Positions]:
    """The token positions of every layer, as what is scored."""
    return [Positions(tokens_of(model, layer), layer) for layer in range(len(model.blocks()))]


def by_layer(scores: Mapping[str, Tensor], model: PrunableModel) -> Tensor:
    """Scores of the token positions of all layers, (L, T).

    Raises:
        InputError: If a layer has none.
    """
    names = [positions.name for positions in positions_of(model)]
    if missing := [name for name in names if name not in scores]:
        raise InputError(f"prune=optin_tau: there are no scores of {missing[0]}; the ranking holds no token positions")
    return torch.stack([scores[name] for name in names])


def positions_in(teacher: Teacher) -> int:
    """Token positions of a sample, T."""
    return teacher.blocks[0].shape[1]  # type: ignore[attr-defined]


def refuse_without_tokens(model: PrunableModel) -> None:
    """Raise an InputError if the model's tokens can't be merged."""
    if reason := model.why_not_mergeable():
        raise InputError(f"prune=optin_tau: model={model.name}: {reason}")


def token_losses(
    model: PrunableModel, data: DataBundle, teacher: Teacher, layer: int, settings: Settings, advance: Advance,
    turns: Turns | None = None,
) -> Losses:  # fmt: skip
    """Losses of every token position at the input of one block on one batch, each (T,); position 0 is the first."""
    if len(teacher.logits) < 2:
        raise InputError("data.calibration_batch_size=1: token positions are compared across samples; take at least 2")
    calls = calls_of_block(model, teacher, layer)
    passes = _TokenPasses(model, data, teacher, layer)
    size = candidates_at_once(calls, teacher.logits, settings)
    score = partial(passes.losses, temperature=settings.temperature)
    return in_turns(positions_in(teacher), size, score, passes, advance, turns)


class _TokenPasses(Stacked):
    """Passes of stacked candidates, each without one position from a layer's input on."""

    def __init__(self, model: PrunableModel, data: DataBundle, teacher: Teacher, layer: int) -> None:
        super().__init__()
        self.model, self.data, self.teacher, self.layer = model, data, teacher, layer
        self.points = compared_points(model, layer)
        earlier = zip(model.blocks()[:layer], teacher.blocks, strict=False)
        ran = [(call.name, call.output) for call in teacher.embedding]
        self.answers = {name: always(output) for name, output in [*ran, *earlier]}

    def losses(self, positions: range, temperature: float) -> Losses:
        """Losses of some positions, each (C,)."""

        def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (without_positions(args[0], positions), *args[1:])

        def distance(name: str, features: Tensor) -> Tensor:
            grams = token_gram(features, len(positions), self.model.feature_axis)
            return (grams - self.teacher.grams[name]).square().sum(dim=(1, 2))

        block = self.model.network.get_submodule(self.model.blocks()[self.layer])
        with replaying(self.model.network, self.answers), hooked(before=[(block, drop)]):
            return compared(
                self.model, self.data, self.teacher, self.teacher.batch, self.points, len(positions), distance,
                temperature,
            )  # fmt: skip


def without_positions(x: Tensor, positions: range) -> Tensor:
    """Stack copies of tokens (B, T, D), each without one position: (C * B, T - 1, D), candidate-major."""
    gone = torch.arange(positions.start, positions.stop, device=x.device)[:, None]
    kept = torch.arange(x.shape[1] - 1, device=x.device).expand(len(positions), -1)
    kept = kept + (kept >= gone)  # (C, T - 1)
    return x[:, kept].transpose(0, 1).flatten(0, 1)  # (B, C, T - 1, D) -> (C * B, T - 1, D)
