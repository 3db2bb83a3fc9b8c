"""Width of gated MLPs: a neuron is a row of the gate, a row of the up projection and a column of what reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel, UnitGroup
from models.cost import CostModel
from prune import passes
from prune.base import Plan, Scores
from prune.budget import Budget, Budgeted, ratio_of, refuse_unreachable
from prune.normalize import Normalization, normalized
from prune.search import select_units
from prune.surgery import cut
from prune.weights import statistics
from prune.width import neurons, scores
from prune.width.counts import Counts, best_of_all, best_of_each, fitting_fraction, same_fraction
from prune.width.neurons import NEURON, columns_of, given_norms, neuron_groups, rows_of
from utils.errors import InputError
from utils.rules import Count, Ratio, Seed, check_fields

Score = Literal["peak_to_peak", "l2", "l1", "variance", "wanda", "data_driven", "random", "first"]
BY_ROWS = {
    "peak_to_peak": scores.peak_to_peak_score,
    "l2": scores.l2_score,
    "l1": scores.l1_score,
    "variance": scores.variance_score,
}
RATIO = 0.2


@dataclass(frozen=True, kw_only=True)
class GluWidth:
    """Removes neurons of MLPs by the weights that make them; attention stays whole.

    An MLP without a gate has one row a neuron, which is then all that a score reads.

    Attributes:
        score: `peak_to_peak` is the sum of `max + |min|` over a neuron's rows, `l2` that of their
            norms, `variance` that of their variances, `l1` the product of their L1 norms; `wanda`
            is the norm of what the neuron gives times that of the column which reads it;
            `data_driven` the ranges of rows and column, each over the layer's largest, times the
            norm of what it gives; `random` and `first` are controls.
        keep_rule: `uniform`, the same fraction of every layer; or `global`, the best of all layers.
        ratio: Fraction of the budget to remove; 0.2 if neither it nor `width` is given.
        width: Neurons to keep in every layer, instead of `ratio`.
        budget: What the ratio is of: `width`, the neurons (of m as published `floor(ratio m)` go,
            in every layer or in all); or the whole model's `macs` or `params`.
        round_to: Kept neurons per layer are a multiple of this, which must divide the width of each.
        min_keep: Neurons kept at least in every layer.
        normalize: How scores of different layers are made comparable (`global`).
        seed: Of the `random` score.
    """

    score: Score = "peak_to_peak"
    keep_rule: Literal["uniform", "global"] = "uniform"
    ratio: Ratio | None = None
    width: Count | None = None
    budget: Budgeted = "width"
    round_to: Count = 1
    min_keep: Count = 1
    normalize: Normalization = "none"
    seed: Seed = 0

    ranks: ClassVar[bool] = True
    # said for all scores: one of weights alone is ranked again for other data, which takes no pass
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = (scores, neurons, passes, statistics)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width is not None:
            self._refuse_beside_width()

    @property
    def name(self) -> str:
        """`glu_width_` and the score."""
        return f"glu_width_{self.score}"

    def ranking_settings(self) -> dict[str, Any]:
        """The score, and the seed of a random one."""
        return {"score": self.score, "seed": self.seed if self.score == "random" else None}

    def check(self, costs: CostModel) -> None:
        """Refuse a model without neurons, widths that `round_to` does not divide, and a ratio out of reach."""
        counts = self._counts(costs)
        for name, count in counts.items():
            if count % self.round_to:
                raise InputError(
                    f"prune.round_to={self.round_to}: must divide the width of every MLP; {name} has {count} neurons, "
                    f"no multiple of it ({gcd(count, self.round_to)} divides both)"
                )
        if self.keep_rule == "uniform":
            self._uniform(counts, costs)
        elif self.budget == "width":
            floors = sum(self._floor(count) for count in counts.values())
            self._refuse_below("neurons in all layers", sum(counts.values()), floors)
        else:
            refuse_unreachable(costs, self._house_budget)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score the neurons of all MLPs; only `wanda` and `data_driven` look at the calibration data."""
        groups = neuron_groups(model)
        found = {group.name: values for group, values in zip(groups, self._scored(model, data, groups), strict=True)}
        return Scores({self.score: {name: values.float().cpu() for name, values in found.items()}})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the best neurons of every layer, or of all."""
        kept = self._select(scores.only(), costs)
        sizes = {**costs.counts, **{name: len(index) for name, index in kept.items()}}
        total, left = (sum(counts[name] for name in kept) for counts in (costs.counts, sizes))
        asked = self._ratio if self.width is None else 1 - self.width * len(kept) / total
        return Plan.of(
            model, kept, budget=self.budget, ratio_asked=asked,
            ratio_reached=1 - left / total if self.budget == "width" else ratio_of(costs, self._house_budget, sizes),
            details={
                "score": self.score, "keep_rule": self.keep_rule, "round_to": self.round_to,
                "neurons": {"kept": left, "count": total, "removed": 1 - left / total},
                **{f"{name}_removed": 1 - costs.total(name, sizes) / costs.total(name) for name in ("macs", "params")},
            },
        )  # fmt: skip

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Slice away, in a copy, every neuron that is not kept."""
        return cut(model, plan)

    def _scored(self, model: PrunableModel, data: DataBundle, groups: list[UnitGroup]) -> list[Tensor]:
        network, kind = model.network, self.score
        if kind in BY_ROWS:
            return [BY_ROWS[kind](rows_of(network, group)) for group in groups]
        if kind == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(group.count, generator=generator) for group in groups]
        if kind == "first":
            return [torch.arange(group.count, 0, -1) for group in groups]
        norms = {name: found.to(model.device) for name, found in given_norms(model, data, groups).items()}
        if kind == "wanda":
            return [scores.wanda_score(columns_of(network, g), norms[g.name]) for g in groups]
        return [scores.data_driven_score(rows_of(network, g), columns_of(network, g), norms[g.name]) for g in groups]

    def _select(self, found: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        counts = self._counts(costs)
        ours = {name: found[name] for name in counts}
        if self.keep_rule == "uniform":
            return best_of_each(ours, self._uniform(counts, costs))
        ours = normalized(ours, self.normalize)
        if self.budget == "width":
            return best_of_all(ours, self._ratio, self.min_keep, self.round_to)
        others = {name: torch.zeros(count) for name, count in costs.counts.items() if name not in ours}
        selected = select_units({**others, **ours}, costs, self._house_budget)
        return {name: selected[name] for name in ours}

    def _uniform(self, counts: Counts, costs: CostModel) -> Counts:
        """What each layer keeps."""
        if self.width is not None:
            return {name: self._given_width(name, count) for name, count in counts.items()}
        if self.budget == "width":
            kept = same_fraction(counts, self._ratio, self.round_to)
        else:
            found = fitting_fraction(counts, costs, self.budget, self._ratio, self.round_to)
            if found is None:
                refuse_unreachable(costs, self._house_budget)
                raise InputError(f"prune.ratio={self._ratio}: no common width of all layers reaches it; lower it")
            kept = found
        for name, count in counts.items():
            if kept[name] < self._floor(count):
                self._refuse_below(f"neurons of {name}", count, self._floor(count), kept[name])
        return kept

    def _given_width(self, name: str, count: int) -> int:
        assert self.width is not None
        if self.width > count:
            raise InputError(f"prune.width={self.width}: must be at most {count}, the neurons of {name}")
        return self.width

    def _floor(self, count: int) -> int:
        """The fewest neurons that a layer may keep."""
        return min(count, -(-self.min_keep // self.round_to) * self.round_to)

    def _refuse_below(self, what: str, count: int, least: int, kept: int | None = None) -> None:
        left = Budget("width", self._ratio).limit(count) if kept is None else kept
        if left < least:
            raise InputError(
                f"prune.ratio={self._ratio}: would leave {left:,} of {count:,} {what}, but with prune.min_keep="
                f"{self.min_keep} and prune.round_to={self.round_to} at least {least:,} must stay; lower prune.ratio"
            )

    def _counts(self, costs: CostModel) -> Counts:
        found = {name: count for name, count in costs.counts.items() if costs.kinds[name] == NEURON and count}
        if not found:
            kinds = ", ".join(dict.fromkeys(costs.kinds.values())) or "no units"
            raise InputError(f"prune=glu_width: the model has no neurons of MLPs to remove; it has {kinds}")
        return found

    def _refuse_beside_width(self) -> None:
        given = f"prune.width={self.width}"
        if self.ratio is not None:
            raise InputError(f"{given}, prune.ratio={self.ratio}: give one of the two, and null for the other")
        if self.keep_rule != "uniform" or self.budget != "width":
            rule = "must be null unless prune.keep_rule=uniform and prune.budget=width"
            raise InputError(f"{given}: {rule}; here they are {self.keep_rule} and {self.budget}")
        if self.width is not None and self.width % self.round_to:
            raise InputError(f"{given}: must be a multiple of prune.round_to={self.round_to}")

    @property
    def _ratio(self) -> float:
        return RATIO if self.ratio is None else self.ratio

    @property
    def _house_budget(self) -> Budget:
        return Budget(self.budget, self._ratio, self.min_keep, self.round_to, kinds=(NEURON,))
