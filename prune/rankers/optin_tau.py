"""OPTIN's Tau: heads and neurons give a share of the MACs, merged tokens the rest, by a schedule from token scores."""

from dataclasses import dataclass, replace
from math import floor
from typing import Annotated, Any, ClassVar, NoReturn

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from models.token_cost import TokenCosts
from prune.base import Method, Plan, Scores
from prune.optin.combine import TOKEN
from prune.optin.exact import exact_losses
from prune.optin.released import Released, released_plan
from prune.optin.tokens import by_layer, positions_of, refuse_without_tokens
from prune.optin.walk import fewest, schedule_of, walked
from prune.rankers import optin
from prune.rankers.optin import CODE, Optin, clean_units
from prune.tokens.costs import cut_costs
from utils.errors import InputError
from utils.rules import Count, Range
from utils.storage import Scratch

SHARE = 0.225
DOUBT = 0.05


@dataclass(frozen=True, kw_only=True)
class OptinTau(Optin):
    """Heads and neurons by OPTIN, then tokens merged before each attention, as many as their scores let go.

    Attributes:
        static_share: Fraction of what is removed that heads and neurons give; None takes 0.225,
            and in compat mode draws it between 0.15 and 0.30 as the released code does.
        min_tokens: Tokens kept at least in every block; None keeps a tenth, and one beside the
            protected ones (clean mode).
        proportional: Whether attention counts a merged token as often as it has members.
    """

    static_share: Annotated[float, Range(0, 1)] | None = None
    min_tokens: Count | None = None
    proportional: bool = True

    search_fields = Optin.search_fields | {"static_share", "min_tokens", "proportional"}
    ranking_code = (*CODE, optin)
    parts: ClassVar[tuple[str, str]] = ("optin", "tome")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != "macs":
            raise InputError(f"prune.budget={self.budget}: must be macs; merging tokens frees no parameters")
        if self.steps > 1:
            raise InputError(f"prune.steps={self.steps}: must be 1; merged tokens can't be merged in rounds")

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "optin_tau"

    def check(self, costs: CostModel) -> None:
        """Refuse a model whose tokens can't be merged, and a share that the floors make unreachable."""
        tokens = _tokens_of(costs)
        if self.min_tokens is not None and self.min_tokens > tokens.tokens:
            raise InputError(f"prune.min_tokens={self.min_tokens}: the model has {tokens.tokens} tokens")
        self._static().check(costs)
        if self.mode == "clean":
            counts = fewest(len(tokens.blocks), tokens.tokens, tokens.protected, self._least(tokens))
            # heads and neurons take the same part of what tokens leave, or nearly: in doubt the plan decides
            left = (1 - self._share * self.ratio) * tokens.total(counts, counts)
            if left > (1 + DOUBT) * self._budget.limit(costs.total("macs")):
                self._refuse(1 - left / costs.total("macs"), tokens)

    def base(self, model: PrunableModel, data: DataBundle) -> Method | None:
        """Heads and neurons as without tokens; compat mode starts from all of the clean raw scores."""
        refuse_without_tokens(model)
        if self.rankings is not None:
            return None
        return clean_units(self) if self.mode == "clean" else replace(self, mode="clean")

    def rank_from(self, base: Scores, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Score the token positions; in compat mode only the heads, anew."""
        if self.mode == "compat":
            return super().rank_from(base, model, data, scratch)
        found = exact_losses(model, data, self._settings(), scratch, [TOKEN])
        names = [positions.name for positions in positions_of(model)]
        terms = {term: {**base.terms[term], **{name: found[term][name] for name in names}} for term in base.terms}
        return Scores(terms, base.facts)

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Cut heads and neurons for their share, then walk the token scores until the budget is met.

        Raises:
            InputError: If tokens can't give their share; it names the largest ratio that can be had.
        """
        if self.mode == "compat":
            return released_plan(model, scores, costs, self._released())
        combined = self.combine(model, scores)
        kept = self._static().select(combined, costs)
        tokens = cut_costs(_tokens_of(costs), model, {name: len(units) for name, units in kept.items()})
        total, least = costs.total("macs"), self._least(tokens)
        scored = by_layer(combined, model)
        counts, met = walked(scored, tokens.protected, least, lambda n: tokens.total(n, n), self._budget.limit(total))
        if not met:
            self._refuse(1 - tokens.total(counts, counts) / total, tokens)
        reduction = replace(schedule_of(counts), proportional=self.proportional)
        return Plan.of(
            model, kept, budget="macs", ratio_asked=self.ratio,
            ratio_reached=1 - tokens.of(reduction) / total, tokens=reduction,
            token_counts=tuple(tokens.counts(reduction)),
            details={"steps": list(self.parts), "static_share": self._share},
        )  # fmt: skip

    def _refuse(self, largest: float, tokens: TokenCosts) -> NoReturn:
        raise InputError(
            f"prune.ratio={self.ratio}: with prune.static_share={self._share:g} and at least {self._least(tokens)} "
            f"tokens a block, tokens can give no more; prune.ratio must be at most {floor(1000 * largest) / 1000:g}"
        )

    @property
    def _share(self) -> float:
        return SHARE if self.static_share is None else self.static_share

    def _static(self) -> Optin:
        """The step that cuts heads and neurons, with its share of the ratio."""
        return replace(clean_units(self), **self._search_settings(), ratio=self._share * self.ratio)

    def _search_settings(self) -> dict[str, Any]:
        names = Optin.search_fields - {"ratio", "rankings"}
        return {name: getattr(self, name) for name in names}

    def _least(self, tokens: TokenCosts) -> int:
        if self.min_tokens is not None:
            return self.min_tokens
        return max(tokens.protected + 1, -(-tokens.tokens // 10))

    def _scored(self, model: PrunableModel) -> tuple[Any, ...]:
        return (*model.unit_groups(), *positions_of(model))

    def _released(self) -> Released:
        return replace(super()._released(), tokens=True, static_share=self.static_share, seed=self.seed)


def _tokens_of(costs: CostModel) -> TokenCosts:
    if costs.tokens is None:
        raise InputError(f"prune=optin_tau: tokens of this model can't be merged: {costs.why_no_tokens}")
    return costs.tokens
