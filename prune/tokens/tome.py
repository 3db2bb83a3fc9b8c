"""Token merging (ToMe): the most similar tokens of each block become one.

Bolya et al., Token Merging (ICLR 2023, arXiv:2210.09461). Nothing is ranked or trained.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from models.merging import Metric, Reduction
from models.token_cost import TokenCosts
from prune.base import Plan, Scores
from prune.surgery import cut
from prune.tokens.schedule import STEPS, GivenOut, Schedule, from_ratio, linear, listed, reachable, shared, tilted
from utils.errors import InputError
from utils.rules import Count, NonNegative, Range, Ratio, Whole, check_fields

RATIO = 0.4


@dataclass(frozen=True, kw_only=True)
class Tome:
    """Merges similar tokens between attention and MLP of every block.

    Attributes:
        r: Tokens merged away in each block: a number for all blocks, or a list with one a block
            (those left out merge none).
        inflection: With a number or a ratio: linear from `r (1 - inflection)` in the first block to
            `r (1 + inflection)` in the last.
        ratio: Fraction of the model's MACs to remove, instead of `r`; 0.4 if neither is given.
        proportional: Whether attention counts a merged token as often as it has members.
        shape: With a ratio: along a `line` over the blocks (flat without inflection), or the same `share` of its
            tokens from every block.
        min_tokens: Tokens left at least in every block; None leaves one that is not protected.
        metric: What tokens are compared by: their `keys`, as published, or the `tokens` themselves.
        importance: How much the class token's attention to its members speaks against a pair.
        growth: How much the number of tokens that it would stand for speaks against a pair.
        front_only: Whether the last block computes queries and MLP for the class token (and what else is protected)
            alone. It merges none then, and the answers stay exactly what they were. Only where the head reads no
            other token.
    """

    r: Whole | tuple[Whole, ...] | None = None
    inflection: Annotated[float, Range(-1, 1)] = 0.0
    ratio: Ratio | None = None
    shape: Literal["line", "share"] = "line"
    proportional: bool = True
    min_tokens: Count | None = None
    metric: Metric = "keys"
    importance: NonNegative = 0.0
    growth: NonNegative = 0.0
    front_only: bool = False

    name: ClassVar[str] = "tome"
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.r is not None and self.ratio is not None:
            raise InputError(f"prune.r={self.r}, prune.ratio={self.ratio}: give one of the two, and null for the other")
        if self.inflection and isinstance(self.r, tuple):
            raise InputError(f"prune.inflection={self.inflection}: must be 0 where prune.r is a list")
        if self.shape == "share" and (self.r is not None or self.inflection):
            raise InputError("prune.shape=share: needs prune.ratio, with prune.r=null and prune.inflection=0")

    def ranking_settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def check(self, costs: CostModel) -> None:
        """Refuse a model without tokens to merge, and a schedule or ratio that it can't have."""
        self.reduction(_tokens_of(costs), costs.total("macs"))

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Find the schedule; the plan has what is executed, caps and floors included."""
        tokens = _tokens_of(costs)
        reduction = self.reduction(tokens, costs.total("macs"))
        reached = 1 - tokens.of(reduction) / costs.total("macs")
        asked = reached if self.r is not None else self._ratio
        return Plan.of(
            model, {}, budget="macs", ratio_asked=asked, ratio_reached=reached,
            tokens=reduction, token_counts=tuple(tokens.counts(reduction)),
        )  # fmt: skip

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Merge tokens in a copy."""
        return cut(model, plan)

    def reduction(self, tokens: TokenCosts, total: int) -> Reduction:
        """How tokens are merged, for a model of these costs.

        Args:
            tokens: Of the model as it is, cut or not.
            total: MACs that the ratio is a fraction of.

        Raises:
            InputError: If the model can't have that schedule.
        """
        merged = self._merged(tokens, total)
        return Reduction(
            merged, "mlp", self.proportional, self.metric, self.importance, self.growth, self.front_only
        )  # fmt: skip

    @property
    def _ratio(self) -> float:
        return RATIO if self.ratio is None else self.ratio

    def _merged(self, tokens: TokenCosts, total: int) -> Schedule:
        if self.importance and not tokens.class_token:
            raise InputError(f"prune.importance={self.importance}: must be 0 for a model without a class token")
        if self.front_only and not tokens.reads_front:
            raise InputError(
                "prune.front_only=true: must be false for a model whose head reads more than tokens in front"
            )
        least = tokens.protected + 1 if self.min_tokens is None else self.min_tokens
        blocks = len(tokens.blocks) - self.front_only
        if self.r is None:
            return from_ratio(tokens, total, self._ratio, least, self._given_out(tokens, blocks), self.front_only)
        merged = linear(self.r, self.inflection, blocks) if isinstance(self.r, int) else listed(self.r, blocks)
        whole = (*merged, 0) if self.front_only else merged
        return reachable(whole, tokens.tokens, tokens.protected, least)

    def _given_out(self, tokens: TokenCosts, blocks: int) -> GivenOut | None:
        if self.shape == "share":
            return partial(shared, tokens=tokens.tokens, protected=tokens.protected, blocks=blocks), STEPS // 2
        if self.inflection:
            return partial(tilted, inflection=self.inflection, blocks=blocks), 2 * blocks * tokens.tokens
        return None


def _tokens_of(costs: CostModel) -> TokenCosts:
    if costs.tokens is None:
        raise InputError(f"prune=tome: tokens of this model can't be merged: {costs.why_no_tokens}")
    return costs.tokens
