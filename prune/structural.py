"""Methods that remove units for real: score them, search a budget, slice the rest away."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, ClassVar, Literal

from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Plan, Scores
from prune.budget import Budget, Budgeted, ratio_of, refuse_unreachable
from prune.latency import plan_by_latency
from prune.normalize import Normalization, normalized
from prune.rounds import Schedule
from prune.search import select_units
from prune.sensitivity.allocation import allotted, curves_of_units
from prune.surgery import cut
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Ratio, Whole, check_fields


@dataclass(frozen=True, kw_only=True)
class Structural(ABC):
    """What all rankers of units share; a ranker adds `rank` and its own settings.

    Attributes:
        ratio: Fraction of the budget to remove.
        budget: What the fraction is of: the whole model's `macs` or `params`, its measured `latency` at a
            saturating batch, or `width`, the same fraction of the units of every group.
        min_keep: Units kept at least in every group.
        round_to: Kept features per group are a multiple of this, or all of them.
        normalize: How scores of different groups are made comparable.
        per_cost: Whether units compete by score per cost, or by score alone.
        kinds: What may go, such as `[neuron]`; None means every kind the model has.
        allocation: How much each group loses: by the scores (None), or by the curves of a sensitivity
            analysis, in a file or (`sensitivity`) made on the way; the scores then choose inside a group.
        steps: Rounds of ranking, cutting and recovery in which the ratio is reached.
        schedule: How the ratio grows over them.
    """

    ratio: Ratio = 0.4
    budget: Budgeted = "macs"
    min_keep: Whole = 1
    round_to: Count = 1
    normalize: Normalization = "none"
    per_cost: bool = True
    kinds: tuple[str, ...] | None = None
    allocation: Literal["sensitivity"] | ExistingPath | None = None
    steps: Count = 1
    schedule: Schedule = "linear"

    ranks: ClassVar[bool] = True
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = ()
    search_fields: ClassVar[frozenset[str]] = frozenset(
        {"ratio", "budget", "min_keep", "round_to", "normalize", "per_cost", "kinds"}
        | {"allocation", "steps", "schedule"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kinds is not None and not self.kinds:
            raise InputError("prune.kinds=[]: must name at least one kind of unit, or be null for all")

    @abstractmethod
    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score every unit of every group; higher means keep."""

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return type(self).__name__.lower()

    def ranking_settings(self) -> dict[str, Any]:
        """All settings but those used at search time."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.search_fields}

    def check(self, costs: CostModel) -> None:
        """Refuse a ratio that the floors make unreachable, before anything is ranked."""
        refuse_unreachable(costs, self._budget)

    def combine(self, model: PrunableModel, scores: Scores) -> Mapping[str, Tensor]:
        """Join a method's raw terms into one score per unit."""
        return scores.only()

    def select(self, scores: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        """Kept units per group: those with the highest score per cost."""
        return select_units(normalized(scores, self.normalize), costs, self._budget)

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the best units within the budget."""
        if self.budget == "latency":
            combined = self.combine(model, scores)
            return plan_by_latency(model, costs, self.ratio, lambda r: replace(self, ratio=r).select(combined, costs))
        combined = self.combine(model, scores)
        if self.allocation is None:
            kept = self.select(combined, costs)
        else:
            units = {name: combined[name] for name in costs.counts}
            kept = select_units(allotted(curves_of_units(self.allocation, costs), units), costs, self._budget)
        reached = ratio_of(costs, self._budget, {name: len(index) for name, index in kept.items()})
        return Plan.of(model, kept, budget=self.budget, ratio_asked=self.ratio, ratio_reached=reached)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Slice away, in a copy, everything that is not kept."""
        return cut(model, plan)

    @property
    def _budget(self) -> Budget:
        kinds = None if self.kinds is None else tuple(self.kinds)
        return Budget(self.budget, self.ratio, self.min_keep, self.round_to, self.per_cost, kinds)
