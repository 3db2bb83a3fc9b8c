"""Several methods one after the other, each with its share of what is removed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel, cost_model
from prune.base import Plan, Scores
from prune.budget import Budget
from prune.ranking import ranked
from prune.rewriting import Applied, applied
from utils.errors import InputError
from utils.rules import Range, Ratio, check_fields
from utils.storage import Store, key_hash

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Carries out methods in their order, each on what the one before has left.

    The ratio is of the whole model. Every step but the last removes its share of it; the last one removes
    what is then still missing, so that the whole is met whatever rounding left over.

    Attributes:
        steps: The methods by any names, in their order; their own ratios are not used.
        shares: What each step gives of what is removed, one a step; they sum to 1.
        ratio: Fraction of the model's MACs to remove.
    """

    steps: Mapping[str, Any]
    shares: tuple[Share, ...]
    ratio: Ratio = 0.4

    name: ClassVar[str] = "steps"
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.steps or len(self.shares) != len(self.steps):
            raise InputError(
                f"prune.shares={list(self.shares)}: must have one entry for each of {len(self.steps)} prune.steps"
            )
        if abs(sum(self.shares) - 1) > 1e-9:
            raise InputError(f"prune.shares={list(self.shares)}: must sum to 1")
        for name, step in self.steps.items():
            if getattr(step, "budget", "macs") != "macs" or not hasattr(step, "ratio"):
                raise InputError(f"prune.steps.{name}: must remove a ratio of the macs to take a share of them")

    def ranking_settings(self) -> dict[str, Any]:
        """There are none: each step is ranked under its own name."""
        return {}

    def check(self, costs: CostModel) -> None:
        """Refuse what the first step can't reach, and models that lack what a later one removes."""
        for share, step in zip(self.shares, self.steps.values(), strict=True):
            _with_ratio(step, share * self.ratio).check(costs)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank ahead."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Say how much is to go; steps are planned as they are carried out."""
        return Plan.of(model, {}, budget="macs", ratio_asked=self.ratio)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Not possible without data and storage."""
        raise RuntimeError("prune.steps are applied by apply_on, which takes the calibration data")

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Carry the steps out on a copy; rankings and calibrations come from the cache where they are there.

        Raises:
            InputError: If a step can't give its share.
        """
        whole = cost_model(model, data.example).total("macs")
        now, found, fingerprints, hits = model, [], [], []
        for number, step in enumerate(self.steps.values()):
            costs = cost_model(now, data.example)
            method = _with_ratio(step, self._ratio_of(number, whole, costs.total("macs")))
            method.check(costs)
            ranking = ranked(method, now, data, store)
            done = applied(method, now, method.plan(now, ranking.scores, costs), data, store)
            found.append(done.plan)
            fingerprints += [ranking.fingerprint, done.fingerprint]
            hits += [kept.hit for kept in (ranking, done) if kept.path is not None]
            now = done.model
        return Applied(now, self._joined(model, now, found, plan), key_hash({"steps": fingerprints}), None, all(hits))

    def _ratio_of(self, number: int, whole: int, left: int) -> float:
        """What a step removes of the model that it is given."""
        last = number == len(self.shares) - 1
        given = 1.0 if last else sum(self.shares[: number + 1])
        limit = Budget("macs", given * self.ratio).limit(whole)
        return max(0.0, 1 - limit / left)

    def _joined(self, model: PrunableModel, now: PrunableModel, found: list[Plan], asked: Plan) -> Plan:
        """One plan for all steps, in the terms of the model that they began with."""
        kept = {name: _positions(model.origin[name], units) for name, units in now.origin.items()}
        last = next((plan for plan in reversed(found) if plan.tokens is not None), None)
        left = 1.0
        for plan in found:
            left *= 1 - plan.ratio_reached
        details: dict[str, Any] = {"steps": list(self.steps), "shares": list(self.shares)}
        details["reached"] = [plan.ratio_reached for plan in found]
        for plan in found:
            details |= {key: value for key, value in plan.details.items() if key != "notes"}
        details["notes"] = [note for plan in found for note in plan.details.get("notes", [])]
        tokens = {} if last is None else {"tokens": last.tokens, "token_counts": last.token_counts}
        joined = Plan.of(model, kept, budget="macs", ratio_asked=self.ratio, ratio_reached=1 - left, **tokens)
        return replace(joined, details=details)


def _with_ratio(step: Any, ratio: float) -> Any:
    return replace(step, ratio=ratio)


def _positions(before: Tensor, after: Tensor) -> Tensor:
    """Where the units that are left stood among those before, ascending."""
    return torch.isin(before, after).nonzero().flatten()
