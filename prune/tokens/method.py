"""What all methods that drop tokens share: settings, the schedule for a ratio, calibration, the plan."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import floor
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch

from data.base import DataBundle
from models import gathering, keeping_flow
from models.base import Batch, PrunableModel
from models.cost import CostModel, cost_model
from models.keeping import Batching, Fuse, Keeping, Rule
from models.merging import Half
from models.token_cost import TokenCosts
from models.token_use import summary
from prune.base import Plan, Scores
from prune.budget import Budget
from prune.ranking import ranking_key
from prune.rewriting import Applied
from prune.surgery import cut
from prune.tokens import calibration, rules, selection
from prune.tokens.calibration import Measured, calibrated, first_samples, largest_keep, measured
from prune.tokens.rules import Above
from utils.errors import InputError
from utils.rules import Count, Range, Ratio, Whole, check_fields
from utils.storage import Artifact, Store, folder_name, key_hash

RATIO = 0.4
GRID = 10_000
Keep = Annotated[float, Range(0, 1, open_low=True)]


@dataclass(frozen=True, kw_only=True)
class TokenMethod(ABC):
    """Drops tokens in some blocks; a method adds by which scores.

    Attributes:
        ratio: Fraction of the model's MACs to remove, instead of `keep`; 0.4 if neither is given.
        budget: What the fraction is of; tokens free MACs and nothing else.
        keep: Share of the tokens entering a block that stays there, special ones not counted: a number for
            all blocks that drop tokens, or a list with one each.
        layers: The blocks that drop tokens, from 0; None takes the method's own.
        min_k: Tokens kept at least, beside the special ones.
        batching: How samples of unequal length are batched: `pad`, `pack`, or `mask`, which saves nothing.
        samples: Calibration samples to look at, at most.
    """

    ratio: Ratio | None = None
    budget: Literal["macs"] = "macs"
    keep: Keep | tuple[Keep, ...] | None = None
    layers: tuple[Whole, ...] | None = None
    min_k: Count = 1
    batching: Batching = "pad"
    samples: Count = 256

    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = True
    needs_class_token: ClassVar[bool] = False
    scored: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = (calibration, rules, selection, gathering, keeping_flow)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None and self.ratio is not None:
            raise InputError(
                f"prune.keep={self.keep}, prune.ratio={self.ratio}: give one of the two, and null for the other"
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for files and reports."""

    @abstractmethod
    def rule(self, keeps: tuple[float, ...]) -> Rule:
        """The rule with these shares."""

    @property
    def half(self) -> Half:
        """Half of the block that tokens go before."""
        return "mlp"

    @property
    def fuse(self) -> Fuse:
        """What dropped tokens leave."""
        return "none"

    @property
    def fixed(self) -> Rule | None:
        """The rule, where the configuration says it all and neither share nor ratio count."""
        return None

    def amount(self, part: float) -> float:
        """What a rule takes for a part in (0, 1] of all that it may keep; 1 is everything."""
        return part

    def default_layers(self, blocks: int) -> tuple[int, ...]:
        """At one, two and three quarters of the depth: blocks 4, 7 and 10 of 12."""
        return tuple(sorted({blocks // 4, blocks // 2, 3 * blocks // 4}))

    def ranking_settings(self) -> dict[str, Any]:
        """All settings, the ratio too: what is learnt from the data depends on it."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def check(self, costs: CostModel) -> None:
        """Refuse a model without tokens to drop, settings that don't fit it, and a ratio that it can't have."""
        tokens = self._tokens(costs)
        layers = self.layers_of(len(tokens.blocks))
        if self.min_k > tokens.tokens:
            raise InputError(f"prune.min_k={self.min_k}: must be at most {tokens.tokens}, the tokens of a sample")
        if self.fixed is None:
            self._shares(tokens, costs.total("macs"), len(layers))
        else:
            self._keeping(len(tokens.blocks), self.fixed, ())

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """The schedule where shapes alone decide it; else what is asked, and `apply_on` finds it."""
        tokens = self._tokens(costs)
        if self.known_ahead(tokens):
            blocks = len(tokens.blocks)
            keeps = self._shares(tokens, costs.total("macs"), len(self.layers_of(blocks)))
            return self._planned(model, costs, self._keeping(blocks, self.rule(keeps), model.special_tokens()))
        return Plan.of(model, {}, budget="macs", ratio_asked=self._ratio)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Drop tokens in a copy, by a plan that is complete."""
        if plan.tokens is None:
            raise RuntimeError(f"prune={self.name} is applied by apply_on, which takes the calibration data")
        return cut(model, plan)

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Drop tokens in a copy; thresholds and counts come from calibration data, or from the cache.

        Raises:
            InputError: If there is no calibration data, or the ratio is out of reach on it.
            RunError: If a score is not finite.
        """
        key = {**ranking_key(self, model, data), "torch": torch.__version__, "device": model.device.type}
        costs = cost_model(model, data.example)
        folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"

        def compute(_: object) -> Artifact:
            batches = first_samples(data.calibration, self.samples)
            keeping, found = self._found(model.copy(), batches, costs, plan)
            facts = {"tokens": keeping.to_json(), "removed": found.removed(self._tokens(costs))}
            facts |= {"kept": summary(found.counts), "uninformative": found.uninformative()}
            return Artifact({"counts": found.counts}, facts)

        found = store.fetch(folder, self.name, key, compute)
        plan = self._carried_out(model, plan, costs, found.artifact.facts)
        return Applied(cut(model, plan), plan, key_hash(key), found.path, found.hit)

    def known_ahead(self, tokens: TokenCosts) -> bool:
        """Whether the schedule, and how many tokens stay, follow from shapes alone."""
        return self.fixed is None and not tokens.ragged and self.rule((1.0,)).exact

    def layers_of(self, blocks: int) -> tuple[int, ...]:
        """The blocks that drop tokens.

        Raises:
            InputError: If one is named that is not there, or twice.
        """
        if self.layers is None:
            # a list as long as the network is one share a block
            every = isinstance(self.keep, tuple | list) and len(self.keep) == blocks
            return tuple(range(blocks)) if every else self.default_layers(blocks)
        found = tuple(self.layers)
        if not found or list(found) != sorted({*found} & {*range(blocks)}):
            raise InputError(f"prune.layers={list(found)}: must ascend without repeats in [0, {blocks}), one at least")
        return found

    @property
    def _ratio(self) -> float:
        return RATIO if self.ratio is None else self.ratio

    def _keeping(self, blocks: int, rule: Rule, special: tuple[int, ...]) -> Keeping:
        return Keeping(rule, self.layers_of(blocks), blocks, self.half, self.batching, self.fuse, special)

    def _given(self, steps: int) -> tuple[float, ...] | None:
        """The shares of the configuration, one a step; None where a ratio decides."""
        if self.keep is None:
            return None
        given = tuple(self.keep) if isinstance(self.keep, tuple | list) else (self.keep,) * steps
        if len(given) != steps:
            raise InputError(f"prune.keep={list(given)}: has {len(given)} entries for {steps} blocks that drop tokens")
        return given

    def _shares(self, tokens: TokenCosts, total: int, steps: int) -> tuple[float, ...]:
        """Shares by the closed form: those given, or the largest equal ones within the budget."""
        if (given := self._given(steps)) is not None:
            return given
        if self._ratio == 0:
            return (1.0,) * steps
        limit, blocks = Budget("macs", self._ratio).limit(total), len(tokens.blocks)

        def cost(part: int) -> int:
            return tokens.of(self._keeping(blocks, self.rule((part / GRID,) * steps), ()))

        if (least := cost(1)) > limit:
            self._refuse(1 - least / total)
        low, high = 1, GRID
        while low < high:  # the largest part of the grid that is within the limit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
        return (low / GRID,) * steps

    def _refuse(self, largest: float) -> None:
        raise InputError(
            f"prune.ratio={self._ratio}: dropping tokens down to prune.min_k={self.min_k} removes at most "
            f"{largest:.4f} of the macs; prune.ratio must be at most {floor(10_000 * largest) / 10_000:g}"
        )

    def _found(
        self, model: PrunableModel, batches: Sequence[Batch], costs: CostModel, plan: Plan
    ) -> tuple[Keeping, Measured]:
        """The keeping, and what it does to the calibration samples."""
        if isinstance(plan.tokens, Keeping):
            return plan.tokens, measured(model, batches, plan.tokens, self.scored)
        tokens, special = self._tokens(costs), model.special_tokens()
        blocks = len(tokens.blocks)
        steps = len(self.layers_of(blocks))

        def at(keeps: tuple[float, ...]) -> tuple[Keeping, Measured]:
            keeping = self._calibrated(model, batches, keeps, lambda rule: self._keeping(blocks, rule, special))
            return keeping, measured(model, batches, keeping, self.scored)

        given = self._given(steps) if self.fixed is None else (1.0,) * steps
        if given is not None or self._ratio == 0:
            return at(given or (1.0,) * steps)
        tried: dict[float, tuple[Keeping, Measured]] = {}

        def removed(keep: float) -> float:
            tried[keep] = at((self.amount(keep),) * steps)
            return tried[keep][1].removed(tokens)

        guess, *_ = self._shares(tokens, costs.total("macs"), steps)
        best = largest_keep(removed, self._ratio, guess, 1 / GRID)
        if best is None:
            self._refuse_on_data([found for _, found in tried.values()], tokens)
        return tried[best]  # type: ignore[index]

    def _calibrated(
        self, model: PrunableModel, batches: Sequence[Batch], keeps: tuple[float, ...],
        keeping_of: Callable[[Rule], Keeping],
    ) -> Keeping:  # fmt: skip
        return keeping_of(self.rule(keeps))

    def _refuse_on_data(self, tried: Sequence[Measured], tokens: TokenCosts) -> None:
        most, blind = max(found.removed(tokens) for found in tried), tried[-1].uninformative()
        why = f"; the scores of blocks {blind} do not differ (uninformative), which keeps all" if blind else ""
        raise InputError(
            f"prune.ratio={self._ratio}: {self.name} removes at most about {most:.4f} of the macs on the "
            f"calibration data{why}"
        )

    def _planned(self, model: PrunableModel, costs: CostModel, keeping: Keeping) -> Plan:
        tokens = self._tokens(costs)
        reached = 1 - tokens.of(keeping) / costs.total("macs")
        asked = self._ratio if self.keep is None else reached
        return Plan.of(
            model, {}, budget="macs", ratio_asked=asked, ratio_reached=reached, tokens=keeping,
            token_counts=tuple(tokens.counts(keeping)),
        )  # fmt: skip

    def _carried_out(self, model: PrunableModel, plan: Plan, costs: CostModel, facts: dict[str, Any]) -> Plan:
        keeping = Keeping.from_json(facts["tokens"])
        kept, blind = facts["kept"], facts["uninformative"]
        details: dict[str, Any] = {"kept": kept, "uninformative": blind, "removed_on_calibration": facts["removed"]}
        details["notes"] = _notes(keeping, blind)
        if self.known_ahead(self._tokens(costs)):
            return replace(plan, details=details)
        reached = facts["removed"]
        asked = reached if self.keep is not None or self.fixed is not None else self._ratio
        means = tuple((row["attention"]["mean"], row["mlp"]["mean"]) for row in kept)
        return replace(
            plan, tokens=keeping, token_counts=means, ratio_asked=asked, ratio_reached=reached, details=details
        )

    def _tokens(self, costs: CostModel) -> TokenCosts:
        if costs.dropping is None:
            raise InputError(f"prune={self.name}: tokens of this model can't be dropped: {costs.why_no_dropping}")
        if self.needs_class_token and not costs.dropping.class_token:
            raise InputError(f"prune={self.name}: this model has no class token, whose attention decides")
        return costs.dropping


@dataclass(frozen=True, kw_only=True)
class Thresholded(TokenMethod):
    """A method whose scores are held against constants.

    Attributes:
        threshold: The constants: a number for all blocks that drop tokens, or a list with one each; -inf keeps
            all, inf only the floor. None calibrates them by `keep` or `ratio`.
    """

    threshold: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            return
        if self.keep is not None or self.ratio is not None:
            raise InputError(
                f"prune.threshold={self.threshold}, prune.keep={self.keep}, prune.ratio={self.ratio}: "
                "give one of the three, and null for the others"
            )
        if not self.by_threshold:
            raise InputError(f"prune.threshold={self.threshold}: must be null with prune.select=topk")
        given = self.threshold if isinstance(self.threshold, list | tuple) else [self.threshold]
        if bad := [t for t in given if type(t) not in (int, float) or t != t]:
            raise InputError(f"prune.threshold={self.threshold}: {bad[0]!r} must be a number")

    @abstractmethod
    def rule_above(self, thresholds: tuple[float, ...]) -> Above:
        """The rule with these constants."""

    @property
    def by_threshold(self) -> bool:
        """Whether constants decide."""
        return True

    def known_ahead(self, tokens: TokenCosts) -> bool:
        """Whether the schedule, and how many tokens stay, follow from shapes alone."""
        return not self.by_threshold and super().known_ahead(tokens)

    @property
    def fixed(self) -> Rule | None:
        """The rule with given constants."""
        return None if self.threshold is None else self.rule_above(self._constants)

    @property
    def _constants(self) -> tuple[float, ...]:
        given = self.threshold
        return tuple(map(float, given)) if isinstance(given, list | tuple) else (float(given),)

    def _keeping(self, blocks: int, rule: Rule, special: tuple[int, ...]) -> Keeping:
        if rule is not self.fixed and rule != self.fixed:
            return super()._keeping(blocks, rule, special)
        return super()._keeping(blocks, self._spread_out(len(self.layers_of(blocks))), special)

    def _spread_out(self, steps: int) -> Above:
        constants = self._constants
        if not isinstance(self.threshold, list | tuple):
            constants = constants * steps
        if len(constants) != steps:
            raise InputError(
                f"prune.threshold={self.threshold}: has {len(constants)} entries for {steps} blocks that drop tokens"
            )
        return self.rule_above(constants)

    def _calibrated(
        self, model: PrunableModel, batches: Sequence[Batch], keeps: tuple[float, ...],
        keeping_of: Callable[[Rule], Keeping],
    ) -> Keeping:  # fmt: skip
        if self.fixed is not None:
            return keeping_of(self.fixed)
        if not self.by_threshold:
            return keeping_of(self.rule(keeps))
        return calibrated(model, batches, keeps, lambda constants: keeping_of(self.rule_above(constants)))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value


def _notes(keeping: Keeping, uninformative: Sequence[int]) -> list[str]:
    found = []
    if uninformative:
        blocks = ", ".join(map(str, uninformative))
        found.append(f"uninformative: the scores of {keeping.rule.name} do not differ in block {blocks}.")
    if keeping.batching == "mask" and keeping.merges:
        found.append("Tokens are masked, not removed: nothing is saved (prune.batching=mask).")
    return found
