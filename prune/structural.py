"""Methods that remove units for real: score them, search a budget, slice the rest away."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Plan, Scores
from prune.budget import Budget, Budgeted, ratio_of, refuse_unreachable
from prune.latency import plan_by_latency
from prune.normalize import Normalization, normalized
from prune.optin.search import two_kinds
from prune.piecewise import two_kinds_in_time
from prune.repair.gradients import GateGradients, kept_gradients
from prune.repair.rearrange import rearranged_plan
from prune.repair.repairs import Repair, Repairs, refuse_unrepairable, repaired
from prune.rewriting import Applied
from prune.rounds import Schedule
from prune.search import select_units
from prune.sensitivity.allocation import allotted, curves_of_units
from prune.surgery import cut
from utils.errors import InputError
from utils.rules import Count, ExistingPath, NonNegative, Range, Ratio, Whole, check_fields
from utils.storage import Store, key_hash

Search = Literal["greedy", "optin"]
# where a plan keeps, until it is carried out, the units of the model that gates are tuned to
TEACHER = "teacher"


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
        search: `greedy` by score per cost, or `optin`, the top heads and the neurons that fit; that is also the
            search of Kwon et al., and under a latency budget theirs for latencies.
        rearrange: Swap units inside each group where that lowers the block-diagonal Fisher; needs labels.
        repair: What is done to the cut model on calibration data, in this order: `bias` puts the removed units' mean
            into the consumers' biases (one without is given one), `refit` reconstructs the consumers by least
            squares, `gates` scales the units that are left; no labels are looked at.
        ridge: How strongly `refit` pulls towards the present weights, in mean squares of the inputs.
        follow: How much of the error of the stream `refit` makes up for at each consumer, from 0 (its own alone) to 1.
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
    search: Search = "greedy"
    rearrange: bool = False
    repair: tuple[Repair, ...] = ()
    ridge: NonNegative = 0.1
    follow: Annotated[float, Range(0, 1)] = 1.0

    ranks: ClassVar[bool] = True
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = ()
    search_fields: ClassVar[frozenset[str]] = frozenset(
        {"ratio", "budget", "min_keep", "round_to", "normalize", "per_cost", "kinds"}
        | {"allocation", "steps", "schedule", "search", "rearrange", "repair", "ridge", "follow"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kinds is not None and not self.kinds:
            raise InputError("prune.kinds=[]: must name at least one kind of unit, or be null for all")
        if self.allocation is not None and self.budget == "latency":
            raise InputError(
                f"prune.allocation={self.allocation}: must be null under prune.budget=latency, whose search goes by "
                "measured times; budget=macs, params and width take it"
            )
        if self.allocation is not None and self.search != "greedy":
            raise InputError(
                f"prune.search={self.search}: must be greedy beside prune.allocation={self.allocation}, which says how "
                "much each group loses"
            )
        self._repairs()  # refuses what can't be done in that order

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
        """Refuse a ratio that the floors make unreachable, an unfit allocation or search, before anything is ranked."""
        refuse_unreachable(costs, self._budget)
        if self.allocation not in (None, "sensitivity"):
            curves_of_units(self.allocation, costs)
        if self.search == "optin" and self.budget != "latency":
            two_kinds({name: torch.zeros(count) for name, count in costs.counts.items()}, costs, self._budget)

    def refuse(self, model: PrunableModel) -> None:
        """Refuse a model that can't be repaired as asked, before anything is ranked."""
        if self.repair:
            refuse_unrepairable(self._repairs(), model)

    def combine(self, model: PrunableModel, scores: Scores) -> Mapping[str, Tensor]:
        """Join a method's raw terms into one score per unit."""
        return scores.only()

    def select(self, scores: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        """Kept units per group by the chosen search."""
        units = normalized({n: scores[n] for n in costs.counts if n in scores}, self.normalize)
        if self.search == "greedy":
            return select_units(units, costs, self._budget)
        return (two_kinds_in_time if self.budget == "latency" else two_kinds)(units, costs, self._budget)

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the best units within the budget."""
        combined = self.combine(model, scores)
        if self.budget == "latency":
            plan = plan_by_latency(model, costs, self.ratio, lambda r: replace(self, ratio=r).select(combined, costs))
        else:
            kept = self._kept(combined, costs)
            reached = ratio_of(costs, self._budget, {name: len(index) for name, index in kept.items()})
            plan = Plan.of(model, kept, budget=self.budget, ratio_asked=self.ratio, ratio_reached=reached)
        return self._with_teacher(plan, combined, costs)

    def _kept(self, combined: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        """Kept units per group, by the scores or by an allocation."""
        if self.allocation is None or self.budget == "latency":
            return self.select(combined, costs)
        units = {name: combined[name] for name in costs.counts}
        return select_units(allotted(curves_of_units(self.allocation, costs), units), costs, self._budget)

    def _with_teacher(self, plan: Plan, combined: Mapping[str, Tensor], costs: CostModel) -> Plan:
        """The plan with the units that the same search keeps at the root of what is left, if gates are tuned to those.

        Behind a refit they are tuned to the dense model: a refitted one is nearer to it than one that is cut halfway
        and left like that.
        """
        steps = list(self.repair)
        if "gates" not in steps or "refit" in steps[: steps.index("gates")]:
            return plan
        # 1 - ratio is left of the whole: half the way there by steps of equal factor
        halfway = replace(self, ratio=round(1 - (1 - self.ratio) ** 0.5, 9))._kept(combined, costs)
        kept = {name: units.tolist() for name, units in halfway.items()}
        return replace(plan, details={**plan.details, TEACHER: kept})

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Slice away, in a copy, everything that is not kept."""
        return cut(model, plan)

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Rearrange the plan, cut by it, and repair what is left; without either, only cut.

        Raises:
            InputError: If there is no calibration data, or the model can't be repaired so.
        """
        teacher = plan.details.get(TEACHER)
        plan = replace(plan, details={name: value for name, value in plan.details.items() if name != TEACHER})
        if self.rearrange:
            plan = rearranged_plan(plan, kept_gradients(self.gradients(), model, data, store))
        if not self.repair:
            return Applied(self.apply(model, plan), plan)
        wanted = None if teacher is None else {name: torch.tensor(kept).long() for name, kept in teacher.items()}
        pruned, facts, found = repaired(self._repairs(plan), model, plan, data, store, wanted)
        said = replace(plan, details={**plan.details, "repair": facts})
        return Applied(pruned, said, key_hash({"repaired": found.path.name}), found.path, found.hit)

    def gradients(self) -> GateGradients:
        """Which gradients rearrangement goes by."""
        return GateGradients()

    def _repairs(self, plan: Plan | None = None) -> Repairs:
        """What is done to a cut model; None for any plan."""
        return Repairs(tuple(self.repair), self.ridge, self.follow)

    @property
    def _budget(self) -> Budget:
        kinds = None if self.kinds is None else tuple(self.kinds)
        return Budget(self.budget, self.ratio, self.min_keep, self.round_to, self.per_cost, kinds)
