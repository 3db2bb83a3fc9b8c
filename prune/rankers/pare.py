"""The recipe that measurement found best without training: units that are missed least, tokens merged, and a refit.

How much units and tokens give is read off two curves, taken once on calibration data: how far the answers move when
units alone go, and when tokens alone do. No label is looked at, nothing is trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch

import prune.optin.search
import prune.rankers.obs
import prune.search
import prune.tokens.schedule
import prune.tokens.tome
from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.cost import CostModel, cost_model
from models.merging import Reduction
from models.token_cost import TokenCosts
from prune.base import Method, Plan, Scores
from prune.rankers.obs import Obs
from prune.repair.rebuild import Pair, rebuilt_abreast
from prune.repair.repairs import CODE, Repair, Repairs
from prune.repair.solvers import Refit
from prune.rewriting import Applied
from prune.sensitivity.allocation import content_of
from prune.split import curves, trials
from prune.split.curves import splits
from prune.split.trials import Parts, answers, tried
from prune.structural import TEACHER
from prune.surgery import cut
from prune.tokens.costs import cut_costs
from prune.tokens.tome import Tome
from utils.errors import InputError, Unreachable
from utils.storage import Scratch, Store

# ratios at which the curves are taken
UNITS, TOKENS = (0.1, 0.25, 0.45), (0.1, 0.25, 0.4, 0.5, 0.6, 0.7)
# chosen on train images that no figure is reported on (docs/results.md)
IMPORTANCE = GROWTH = 0.1
# where tokens alone go, consumers hold this much more to their weights
FIRM = 10.0
# how merging falls along the blocks: by lines of these inflections, or (None) the same share of each block's tokens
SHAPES = (None, -0.25, -0.6)


@dataclass(frozen=True, kw_only=True)
class Pare(Obs):
    """Units by optimal brain surgeon, and tokens, where a model has some to merge; consumers are refitted to the rest.

    Where the head reads the class token alone, the last block is computed for it alone.

    Attributes:
        tokens: Whether tokens may be merged; they are under `budget=macs` with `kinds` null. False cuts units alone.
    """

    tokens: bool = True
    repair: tuple[Repair, ...] = ("refit",)

    ranking_code: ClassVar[tuple[ModuleType, ...]] = (
        *Obs.ranking_code, *CODE, prune.rankers.obs, prune.search, prune.optin.search, prune.tokens.tome,
        prune.tokens.schedule, curves, trials,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > 1 and self.merges:
            raise InputError(f"prune.steps={self.steps}: must be 1, or prune.tokens=false; tokens merge in one round")

    @property
    def merges(self) -> bool:
        """Whether tokens may be merged, if the model has any to merge."""
        return self.tokens and self.budget == "macs" and self.kinds is None

    def ranking_settings(self) -> dict[str, Any]:
        """Those of the units, and what the curves depend on: how units are searched and made up for."""
        if not self.merges:
            return {**super().ranking_settings(), "merges": False}
        searched = {name: getattr(self, name) for name in sorted(self.search_fields - {"ratio", "rearrange"})}
        return {
            **super().ranking_settings(), "merges": True, **searched,
            "repair": list(self.repair), "allocation": content_of(self.allocation),
        }  # fmt: skip

    def base(self, model: PrunableModel, data: DataBundle) -> Method | None:
        """The units, which `prune=obs` scores as well."""
        return Obs(**{field.name: getattr(self, field.name) for field in fields(Obs)})

    def rank_from(self, base: Scores, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Take the curves, where there is something to split."""
        costs = cost_model(model, data.example)
        tokens = costs.tokens
        if not self.merges or tokens is None:
            return base
        parts = Parts.of(data)
        dense = answers(model, parts.judged)
        students = self._students(model, base, costs, parts.fitted)

        def merging(shape: float | None, ratio: float) -> Reduction:
            return careful(ratio, tokens, shape).reduction(tokens, costs.total("macs"))

        def of_tokens(shape: float | None, ratio: float) -> PrunableModel:
            pruned = model.copy()
            pruned.reduce_tokens(merging(shape, ratio))
            return pruned

        units = tried(dense, data, parts.judged, [students.__getitem__], students, "units tried")
        ways = [partial(of_tokens, shape) for shape in SHAPES]
        merged = tried(dense, data, parts.judged, ways, TOKENS, "tokens tried")
        # the least that can go may be more than was asked for
        reached = {
            1 - tokens.of(merging(SHAPES[way], at)) / costs.total("macs"): (lost, way) for at, lost, way in merged
        }
        points = [(at, *reached[at]) for at in sorted(reached)]
        return Scores(base.terms, {**base.facts, "units": units, "tokens": points})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Units for their part of the ratio, then tokens until the budget is met."""
        tokens = costs.tokens
        if not self.merges or tokens is None or not self.ratio:
            return super().plan(model, scores, costs)
        tried = {name: scores.facts[name] for name in ("units", "tokens")}
        units, merged = ([(at, value) for at, value, _ in points] for points in tried.values())
        for share in splits(units, merged, self.ratio):
            plan = self._split(share, model, scores, costs, tokens)
            if plan is not None:
                return replace(plan, details={"ratio_of_units": round(share, 9), **plan.details, "tried": tried})
        raise AssertionError("units alone are among the splits")

    def _split(
        self, share: float, model: PrunableModel, scores: Scores, costs: CostModel, tokens: TokenCosts
    ) -> Plan | None:
        """Units for a ratio, and tokens for the rest; None where tokens of what units leave can't give it."""
        if share >= self.ratio:
            return super().plan(model, scores, costs)
        combined, whole = self.combine(model, scores), costs.total("macs")

        def at(part: float) -> tuple[dict[str, torch.Tensor], TokenCosts, Reduction]:
            kept = replace(self, ratio=part)._kept(combined, costs) if part else {}
            left = cut_costs(tokens, model, {name: len(units) for name, units in kept.items()})
            shape = _nearest(scores.facts["tokens"], 1 - (1 - self.ratio) / (1 - part))
            return kept, left, careful(self.ratio, tokens, shape).reduction(left, whole)

        try:
            if share and not at(share)[2].merges:  # the last block gives more than is missing
                share = round(least(lambda part: not at(part)[2].merges, share), 9)
            kept, left, reduction = at(share)
        except Unreachable:
            return None
        plan = Plan.of(
            model, kept, budget="macs", ratio_asked=self.ratio,
            ratio_reached=1 - left.of(reduction) / whole, tokens=reduction, token_counts=tuple(left.counts(reduction)),
        )  # fmt: skip
        plan = replace(self, ratio=share)._with_teacher(plan, combined, costs)
        return replace(plan, details={**plan.details, "ratio_of_units": round(share, 9)})

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """As for any method of units; without a unit or a token gone there is nothing to make up for."""
        if plan.keeps_all_units and not (plan.tokens and plan.tokens.merges):
            whole = replace(plan, details={name: value for name, value in plan.details.items() if name != TEACHER})
            return Applied(self.apply(model, whole), whole)
        return super().apply_on(model, plan, data, store)

    def refuse(self, model: PrunableModel) -> None:
        """Refuse a model that merges already, beside one that can't be repaired."""
        super().refuse(model)
        if self.merges and model.reduction is not None and model.reduction.merges:
            raise InputError(
                f"prune=pare: tokens of model={model.name} are merged already; prune.tokens=false cuts its units alone"
            )

    def _repairs(self, plan: Plan | None = None) -> Repairs:
        found = super()._repairs(plan)
        if plan is None or plan.tokens is None or not plan.keeps_all_units:
            return found
        return replace(found, ridge=FIRM * self.ridge)

    def _students(
        self, model: PrunableModel, scores: Scores, costs: CostModel, fitted: Sequence[Batch]
    ) -> dict[float, PrunableModel]:
        """Models with their units cut and refitted, by their ratio, up to the last one that units alone can give."""
        combined, pairs = self.combine(model, scores), dict[float, Pair]()
        whole = {group.name: torch.arange(group.count) for group in model.unit_groups()}
        for ratio in UNITS:
            method = replace(self, ratio=ratio)
            try:
                method.check(costs)
            except Unreachable:
                break
            plan = Plan.of(model, method._kept(combined, costs))
            pairs[ratio] = Pair(model, cut(model, plan), whole, plan.kept, model)
        if "refit" in self.repair and pairs:
            rebuilt_abreast([*pairs.values()], fitted, Refit(self.ridge, self.follow), "refit")
        return {ratio: pair.student for ratio, pair in pairs.items()}


def least(holds: Callable[[float], bool], largest: float) -> float:
    """The least ratio for which something holds that holds for a larger one; to a ten-thousandth."""
    low, high = 0.0, largest
    while high - low > 1e-4:
        middle = (low + high) / 2
        try:
            low, high = (low, middle) if holds(middle) else (middle, high)
        except Unreachable:
            low = middle
    return high


def _nearest(points: Sequence[tuple[float, float, int]], ratio: float) -> float | None:
    """The shape that was best at the ratio nearest to this one."""
    return SHAPES[min(points, key=lambda point: abs(point[0] - ratio))[2]] if points else None


def careful(ratio: float, tokens: TokenCosts, inflection: float | None = None) -> Tome:
    """Tokens compared by themselves; what the class token looks at, and what stands for many, is merged last.

    Args:
        ratio: Fraction of the MACs to remove.
        tokens: Of the model; says whether there is a class token to ask, and whether it alone is read.
        inflection: Of the line along which merging falls; None: the same share from every block.
    """
    return Tome(
        ratio=ratio, shape="share" if inflection is None else "line", inflection=inflection or 0.0,
        metric="tokens", importance=IMPORTANCE if tokens.class_token else 0.0, growth=GROWTH,
        front_only=tokens.reads_front,
    )  # fmt: skip
