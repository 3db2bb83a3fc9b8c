"""Removal for real, and its mirror image the mask: both must give the same outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from models.base import PrunableModel
from models.slicing import keep_units
from prune.base import Plan
from prune.gates import gated, plan_gates

M = TypeVar("M", bound=PrunableModel)


def cut(model: M, plan: Plan) -> M:
    """Return a copy of the model from which everything the plan does not keep is gone.

    The model itself is not changed, and the copy carries no hooks. A plan that says nothing of
    tokens leaves their flow as it is.
    """
    pruned = model.copy()
    keep_units(pruned.network, model.unit_groups(), plan.kept)
    pruned.origin = {name: model.origin[name][kept] for name, kept in plan.kept.items()}
    if plan.tokens is not None:
        pruned.reduce_tokens(plan.tokens)
    return pruned


@contextmanager
def masked(model: PrunableModel, plan: Plan) -> Iterator[None]:
    """Silence, for the block, every unit that the plan does not keep; tokens flow as before."""
    with gated(model, plan_gates(model, plan)):
        yield
