"""No pruning: evaluate a model as it is, for example one that was cut and saved before."""

from dataclasses import dataclass
from typing import Any, ClassVar

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Plan, Scores
from prune.surgery import cut


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Keeps everything; has no ratio."""

    name: ClassVar[str] = "none"
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = False

    def ranking_settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def check(self, costs: CostModel) -> None:
        """Nothing can be unreachable."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """The full plan."""
        return Plan.of(model, {})

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """The model itself."""
        return model


@dataclass(frozen=True, kw_only=True)
class Copy(Nothing):
    """Keeps everything, by the same way as a real cut: what is measured against the model is a copy of it."""

    name: ClassVar[str] = "copy"

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """A copy, cut by the full plan."""
        return cut(model, plan)
