"""How much has to go and what has to stay, in exact integers."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, gcd
from typing import Literal

from models.cost import CostModel
from utils.errors import InputError, Unreachable

Budgeted = Literal["macs", "params", "width", "latency"]


@dataclass(frozen=True)
class Budget:
    """What a ratio refers to, and the floors.

    Attributes:
        of: `macs`, `params`, `latency`, or `width` (the units of every group by themselves).
        ratio: Fraction to remove, in [0, 1).
        min_keep: Units kept at least in every group.
        round_to: Kept features per group are a multiple of this, or all of them.
        per_cost: Whether units compete by score per cost, or by score alone.
        kinds: What may go, such as `neuron`; None means every kind.
    """

    of: Budgeted
    ratio: float | Fraction
    min_keep: int = 1
    round_to: int = 1
    per_cost: bool = True
    kinds: tuple[str, ...] | None = None

    def limit(self, total: int) -> int:
        """Most of a total that may be left; 0.9 of ten units leaves one, not 0.99999."""
        return floor((1 - Fraction(str(self.ratio))) * total)

    def sizes(self, count: int, width: int) -> list[int]:
        """Numbers of units a group may keep, from all of them down to its floor.

        Args:
            count: Units in the group.
            width: Features per unit; `round_to` is in features.
        """
        step = self.round_to // gcd(self.round_to, width)
        least = min(self.min_keep, count)
        aligned = range(count // step * step, -1, -step)
        return list(dict.fromkeys([count, *(size for size in aligned if size >= least)]))

    def sizes_of(self, costs: CostModel, group: str) -> list[int]:
        """Numbers of units that a group may keep; all of them where its kind may not go."""
        if self.kinds is not None and costs.kinds.get(group) not in self.kinds:
            return [costs.counts[group]]
        return self.sizes(costs.counts[group], costs.widths[group])


def ratio_of(costs: CostModel, budget: Budget, kept: Mapping[str, int]) -> float:
    """Fraction of the budgeted quantity that is gone; of the width, that of the groups that may go."""
    if budget.of == "width":
        free = [name for name in costs.counts if len(budget.sizes_of(costs.reference, name)) > 1]
        total, left = (sum(counts[name] for name in free) for counts in (costs.reference.counts, kept))
    else:
        total, left = costs.reference.total(budget.of), costs.total(budget.of, kept)
    return 1 - left / total if total else 0.0


def refuse_unreachable(costs: CostModel, budget: Budget) -> None:
    """Raise an InputError if the budget can't be met: an Unreachable that names the reachable minimum."""
    if unknown := set(budget.kinds or ()) - set(costs.kinds.values()):
        known = ", ".join(dict.fromkeys(costs.kinds.values()))
        raise InputError(f"prune.kinds={list(budget.kinds or ())}: the model has no {unknown.pop()!r}; it has {known}")
    floors = {name: budget.sizes_of(costs, name)[-1] for name in costs.counts}
    if budget.of != "width":
        total, least = costs.reference.total(budget.of), costs.total(budget.of, floors)
        what = "nanoseconds" if budget.of == "latency" else budget.of
        _refuse(budget, f"{what} of the model", total, least)
        return
    for name in costs.counts:
        if len(budget.sizes_of(costs, name)) > 1:
            _refuse(budget, f"units of {name}", costs.reference.counts[name], floors[name])


def _refuse(budget: Budget, what: str, total: int, least: int) -> None:
    limit = budget.limit(total)
    if least > limit:
        hint = ", or those two lower" if budget.min_keep > 1 or budget.round_to > 1 else ""
        hint += ", or more kinds allowed" if budget.kinds is not None else ""
        largest = floor(10_000 * (1 - least / total)) / 10_000
        raise Unreachable(
            f"prune.ratio={budget.ratio}: would leave {limit:,} of {total:,} {what}, but with "
            f"prune.min_keep={budget.min_keep} and prune.round_to={budget.round_to} the reachable "
            f"minimum is {least:,}; prune.ratio must be at most {largest:g}{hint}"
        )
