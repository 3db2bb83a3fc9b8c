"""Depth: whole blocks go, those that turn what flows through them least."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune import passes
from prune.base import BlockPlan, Plan, Scores
from prune.depth import scores, stream
from prune.surgery import cut
from utils.errors import InputError
from utils.rules import Ratio, Whole, check_fields

RATIO = 0.25


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Removes blocks of a model whose blocks all keep the shape of what flows through them.

    Attributes:
        score: `block_influence`, one minus the mean cosine of a block's input and output over all
            tokens: the lowest go, wherever they are; or `angular_window`, the angle across so many
            blocks in a row at each sample's last token: the window with the smallest goes.
        ratio: Fraction of the budget to remove; 0.25 if neither it nor `blocks` is given.
        blocks: Number of blocks to remove, instead of `ratio`.
        budget: What the ratio is of: the `blocks`, or the whole model's `macs` or `params`. The
            fewest blocks go that reach it.
    """

    score: Literal["block_influence", "angular_window"] = "block_influence"
    ratio: Ratio | None = None
    blocks: Whole | None = None
    budget: Literal["blocks", "macs", "params"] = "blocks"

    ranks: ClassVar[bool] = True
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = (scores, stream, passes)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ratio is not None and self.blocks is not None:
            both = f"prune.ratio={self.ratio}, prune.blocks={self.blocks}"
            raise InputError(f"{both}: give one of the two, and null for the other")

    @property
    def name(self) -> str:
        """`depth_block_influence` or `depth_angular_window`."""
        return f"depth_{self.score}"

    def ranking_settings(self) -> dict[str, Any]:
        """The score; how many blocks go is a matter of the plan."""
        return {"score": self.score}

    def check(self, costs: CostModel) -> None:
        """Refuse a model whose blocks must stay, and a number of blocks that leaves none."""
        if costs.why_blocks_stay is not None:
            raise InputError(f"prune=depth: no block of this model can be removed: {costs.why_blocks_stay}")
        if self.blocks is not None and self.blocks >= costs.blocks:
            rule = f"must be below {costs.blocks}, all blocks that the model has"
            raise InputError(f"prune.blocks={self.blocks}: {rule}; at least one stays")
        if self.blocks is None:
            self._refuse_unreachable(costs, min(self._left(costs, [block]) for block in range(costs.blocks)))

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score blocks, or windows of every length, in one pass over the calibration batches.

        Raises:
            InputError: If a block changes the shape, or there is no calibration data.
            RunError: If a state has no direction: it is zero or not finite.
        """
        if self.score == "block_influence":
            return Scores({self.score: {"blocks": stream.block_influence(model, data)}})
        windows = {f"windows_of_{size}": values for size, values in stream.angular_distances(model, data).items()}
        return Scores({self.score: windows or {"blocks": torch.zeros(len(model.blocks()))}})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Remove as few blocks as reach the budget.

        Raises:
            InputError: If even all but one do not.
        """
        kept = self._kept(scores, costs)
        asked = self._ratio if self.blocks is None else self.blocks / costs.blocks
        gone = {name: 1 - costs.total(name, blocks=kept) / costs.total(name) for name in ("macs", "params")}
        plan = BlockPlan(kept, costs.blocks)
        details = {"score": self.score, "removed_blocks": list(plan.removed)}
        return Plan.of(
            model, {}, budget=self.budget, ratio_asked=asked, blocks=plan,
            ratio_reached=len(plan.removed) / costs.blocks if self.budget == "blocks" else gone[self.budget],
            details=details | {f"{name}_removed": value for name, value in gone.items()},
        )  # fmt: skip

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Remove, in a copy, every block that is not kept."""
        return cut(model, plan)

    @property
    def _ratio(self) -> float:
        return RATIO if self.ratio is None else self.ratio

    def _kept(self, scores: Scores, costs: CostModel) -> tuple[int, ...]:
        if self.blocks is not None:
            return kept_blocks(scores, costs.blocks, self.blocks)
        choices = (kept_blocks(scores, costs.blocks, count) for count in range(costs.blocks))
        limit = self._limit(costs)
        fitting = next((kept for kept in choices if self._left(costs, kept) <= limit), None)
        if fitting is None:
            self._refuse_unreachable(costs, self._left(costs, kept_blocks(scores, costs.blocks, costs.blocks - 1)))
        assert fitting is not None
        return fitting

    def _left(self, costs: CostModel, kept: Sequence[int]) -> int:
        return len(kept) if self.budget == "blocks" else costs.total(self.budget, blocks=kept)

    def _limit(self, costs: CostModel) -> int:
        return floor((1 - Fraction(str(self._ratio))) * self._left(costs, range(costs.blocks)))

    def _refuse_unreachable(self, costs: CostModel, least: int) -> None:
        total, limit = self._left(costs, range(costs.blocks)), self._limit(costs)
        if least > limit:
            largest = floor(10_000 * (1 - least / total)) / 10_000
            raise InputError(
                f"prune.ratio={self._ratio}: would leave {limit:,} of {total:,} {self.budget} of the model, but with "
                f"one block left the reachable minimum is {least:,}; prune.ratio must be at most {largest:g}"
            )


def kept_blocks(scores: Scores, blocks: int, count: int) -> tuple[int, ...]:
    """Positions of the blocks that stay when `count` of them go.

    Single blocks go by the lowest score, of equal ones the later first; of windows, which are scored
    by length, the one with the lowest score goes, of equal ones the first.

    Args:
        scores: Of `blocks`, (L,), or of `windows_of_<n>`, (L - n + 1,); higher means keep.
        blocks: Number of blocks, L.
        count: Blocks to remove, below L.
    """
    if count == 0:
        return tuple(range(blocks))
    values = scores.only()
    gone = _lowest(values["blocks"], count) if "blocks" in values else _window(values[f"windows_of_{count}"], count)
    return tuple(position for position in range(blocks) if position not in gone)


def _lowest(values: Tensor, count: int) -> set[int]:
    return set(values.argsort(descending=True, stable=True)[len(values) - count :].tolist())


def _window(values: Tensor, count: int) -> range:
    first = min(range(len(values)), key=values.tolist().__getitem__)
    return range(first, first + count)
