"""Methods that rewrite weights instead of removing units: they need data and storage to be applied."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Method, Plan
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
        return method.apply_on(model, plan, data, store)
    return Applied(method.apply(model, plan), plan)
