"""Token merging (ToMe): the most similar tokens of each block become one.

Bolya et al., Token Merging (ICLR 2023, arXiv:2210.09461). Nothing is ranked or trained.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from models.merging import Reduction
from models.token_cost import TokenCosts
from prune.base import Plan, Scores
from prune.surgery import cut
from prune.tokens.schedule import Schedule, from_ratio, linear, listed, reachable
from utils.errors import InputError
from utils.rules import Count, Range, Ratio, Whole, check_fields

RATIO = 0.4


@dataclass(frozen=True, kw_only=True)
class Tome:
    """Merges similar tokens between attention and MLP of every block.

    Attributes:
        r: Tokens merged away in each block: a number for all blocks, or a list with one a block
            (those left out merge none).
        inflection: With a number: linear from `r (1 - inflection)` in the first block to
            `r (1 + inflection)` in the last.
        ratio: Fraction of the model's MACs to remove, instead of `r`; 0.4 if neither is given.
        proportional: Whether attention counts a merged token as often as it has members.
        min_tokens: Tokens left at least in every block; None leaves one that is not protected.
    """

    r: Whole | tuple[Whole, ...] | None = None
    inflection: Annotated[float, Range(-1, 1)] = 0.0
    ratio: Ratio | None = None
    proportional: bool = True
    min_tokens: Count | None = None

    name: ClassVar[str] = "tome"
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.r is not None and self.ratio is not None:
            raise InputError(f"prune.r={self.r}, prune.ratio={self.ratio}: give one of the two, and null for the other")
        if self.inflection and not isinstance(self.r, int):
            raise InputError(f"prune.inflection={self.inflection}: must be 0 unless prune.r is one number")

    def ranking_settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def check(self, costs: CostModel) -> None:
        """Refuse a model without tokens to merge, and a schedule or ratio that it can't have."""
        self._schedule(costs)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Find the schedule; the plan has what is executed, caps and floors included."""
        reduction = Reduction(self._schedule(costs), "mlp", self.proportional)
        tokens = _tokens_of(costs)
        reached = 1 - tokens.of(reduction) / costs.total("macs")
        asked = reached if self.r is not None else self._ratio
        return Plan.of(
            model, {}, budget="macs", ratio_asked=asked, ratio_reached=reached,
            tokens=reduction, token_counts=tuple(tokens.counts(reduction)),
        )  # fmt: skip

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Merge tokens in a copy."""
        return cut(model, plan)

    @property
    def _ratio(self) -> float:
        return RATIO if self.ratio is None else self.ratio

    def _schedule(self, costs: CostModel) -> Schedule:
        tokens = _tokens_of(costs)
        least = tokens.protected + 1 if self.min_tokens is None else self.min_tokens
        if self.r is None:
            return from_ratio(tokens, costs.total("macs"), self._ratio, least)
        blocks = len(tokens.blocks)
        merged = linear(self.r, self.inflection, blocks) if isinstance(self.r, int) else listed(self.r, blocks)
        return reachable(merged, tokens.tokens, tokens.protected, least)


def _tokens_of(costs: CostModel) -> TokenCosts:
    if costs.tokens is None:
        raise InputError(f"prune=tome: tokens of this model can't be merged: {costs.why_no_tokens}")
    return costs.tokens
