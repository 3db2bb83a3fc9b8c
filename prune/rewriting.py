"""Methods that rewrite weights instead of removing units: they need data and storage to be applied."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Method, Plan, Scores
from utils.storage import Store


@dataclass(frozen=True)
class Applied:
    """A pruned model, and the plan with what was found on the way.

    Attributes:
        model: The pruned copy.
        plan: The plan as it was carried out.
        fingerprint: Hash of everything that rewritten weights depend on; None where nothing was rewritten.
        path: The cache file that holds them.
        hit: Whether they were there already.
    """

    model: PrunableModel
    plan: Plan
    fingerprint: str | None = None
    path: Path | None = None
    hit: bool = False


@runtime_checkable
class Rewriting(Protocol):
    """A method that looks at calibration data while it is applied, and keeps what it wrote."""

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Return a rewritten copy, from where an interrupted run stopped; the model stays as it was."""
        ...


def applied(method: Method, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
    """Carry out a plan, whatever kind of method made it."""
    if isinstance(method, Rewriting):
        done = method.apply_on(model, plan, data, store)
    else:
        done = Applied(method.apply(model, plan), plan)
    if any(matrix.zeros for matrix in done.plan.matrices):
        done.model.sparse = True
    return done


@runtime_checkable
class Refusing(Protocol):
    """A method that can't do what it is set to do to every model, which costs alone do not tell."""

    def refuse(self, model: PrunableModel) -> None:
        """Raise an InputError if this is such a model."""
        ...


def refuse_unreachable(method: Method, model: PrunableModel, costs: CostModel) -> None:
    """Refuse, before any work, what a method can't do to a model.

    A plan that needs no scores is made once for what it refuses, such as a pattern that does not divide a
    linear's inputs.

    Raises:
        InputError: If there is such a thing.
    """
    method.check(costs)
    if isinstance(method, Refusing):
        method.refuse(model)
    if not method.ranks:
        method.plan(model, Scores({}), costs)
