"""Removal for real, and its mirror image the mask: both must give the same outputs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from models.base import PrunableModel
from models.slicing import keep_units
from prune.base import Plan
from prune.gates import gated, plan_gates
from utils.hooks import hooked

M = TypeVar("M", bound=PrunableModel)


def cut(model: M, plan: Plan) -> M:
    """Return a copy of the model from which everything the plan does not keep is gone.

    The model itself is not changed, and the copy carries no hooks. A plan that says nothing of
    tokens leaves their flow as it is.
    """
    pruned = model.copy()
    keep_units(pruned.network, model.unit_groups(), plan.kept)
    pruned.origin = {name: model.origin[name][kept] for name, kept in plan.kept.items()}
    if plan.blocks is not None and plan.blocks.removed:
        if plan.blocks.count != len(model.blocks()):
            raise ValueError(f"the plan is for {plan.blocks.count} blocks, the model has {len(model.blocks())}")
        pruned.keep_blocks(plan.blocks.kept)
    if plan.tokens is not None:
        pruned.reduce_tokens(plan.tokens)
    return pruned


@contextmanager
def masked(model: PrunableModel, plan: Plan) -> Iterator[None]:
    """Silence, for the `with`, every unit and skip every block that the plan does not keep; tokens flow as before."""
    with gated(model, plan_gates(model, plan)), skipped(model, plan.blocks.removed if plan.blocks else ()):
        yield


@contextmanager
def skipped(model: PrunableModel, blocks: Sequence[int]) -> Iterator[None]:
    """Let what enters the blocks at these positions pass them unchanged."""
    names = [model.blocks()[position] for position in blocks]
    with hooked(after=[(model.network.get_submodule(name), _pass_through) for name in names]):
        yield


def _pass_through(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0] if isinstance(output, Tensor) else type(output)((args[0], *output[1:]))
