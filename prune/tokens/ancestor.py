"""Dropping tokens as the ancestor published it: one norm for all layers, guessed, in a loop over samples.

For its figures only; `prune=threshold_l2` calibrates a threshold a layer and runs batched.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Plan, Scores
from utils.errors import InputError
from utils.rules import NonNegative, check_fields

NOTE = (
    "This is the published set-up, mistakes included, run for its figures only: the labels are random, attention runs "
    "over the samples of a batch and not over tokens, and padding is neither masked nor left out of the mean."
)


@runtime_checkable
class Dropping(Protocol):
    """A model that drops tokens by one threshold."""

    def drop_below(self, threshold: float) -> None:
        """Drop tokens whose norm is not above it from now on, in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class AncestorThreshold:
    """Drops tokens whose L2 norm is not above a constant before every layer.

    Attributes:
        threshold: The constant. U[0, 1] tokens of width 512 have norms of 13.07 +- 0.26, so 13 parts them by chance.
    """

    threshold: NonNegative = 13.0

    name: ClassVar[str] = "ancestor_threshold"
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = (NOTE,)

    def __post_init__(self) -> None:
        check_fields(self)

    def ranking_settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def check(self, costs: CostModel) -> None:
        """What it removes depends on the data; nothing can be unreachable."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Every unit stays; the threshold is all there is.

        Raises:
            InputError: If the model is another one.
        """
        if not isinstance(model, Dropping):
            raise InputError("prune=ancestor_threshold: needs model=ancestor_encoder; others take prune=threshold_l2")
        return Plan.of(model, {}, details={"threshold": self.threshold})

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Drop tokens in a copy."""
        pruned = model.copy()
        assert isinstance(pruned, Dropping)
        pruned.drop_below(plan.details["threshold"])
        return pruned
