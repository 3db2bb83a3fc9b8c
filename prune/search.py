"""Choosing units within a budget: greedy by score per cost, exact to one unit, deterministic.

Costs are integers from the model's cost model, so a budget is met or not without rounding.
Within a group the units with the lowest scores go first, of equal ones the later. Between
groups the one whose next units have the lowest score per cost (or score) goes first; of equal
ones the group that has lost the smaller part so far, then the earlier.
"""

import heapq
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from models.cost import CostModel, Quantity
from prune.budget import Budget, refuse_unreachable
from utils.errors import RunError

Counts = dict[str, int]


def select_units(scores: Mapping[str, Tensor], costs: CostModel, budget: Budget) -> dict[str, Tensor]:
    """Keep the best units: never more than the budget allows, and all that still fit.

    Args:
        scores: Per group (count,), higher means keep, comparable between groups.
        costs: Cost of the model for any numbers of kept units.
        budget: What has to go.

    Returns:
        Ascending indices of the kept units per group, int64.

    Raises:
        InputError: If the floors keep the budget from being reached.
        RunError: If scores are missing or of the wrong length.
    """
    _refuse_misfit(scores, costs)
    refuse_unreachable(costs, budget)
    counts = _by_width(costs, budget) if budget.of == "width" else _Greedy(scores, costs, budget, budget.of).run()
    best_first = {name: scores[name].argsort(descending=True, stable=True) for name in costs.counts}
    return {name: order[: counts[name]].sort().values for name, order in best_first.items()}


def _refuse_misfit(scores: Mapping[str, Tensor], costs: CostModel) -> None:
    for name, count in costs.counts.items():
        if name not in scores or scores[name].shape != (count,):
            found = tuple(scores[name].shape) if name in scores else "nothing"
            raise RunError(f"scores of {name}: found {found}; must be ({count},), one score a unit")


def _by_width(costs: CostModel, budget: Budget) -> Counts:
    """The same fraction of every group."""
    sizes = {name: budget.sizes_of(costs, name) for name in costs.counts}
    return {
        name: next((size for size in sizes[name] if size <= budget.limit(count)), sizes[name][-1])
        for name, count in costs.reference.counts.items()
    }


class _Greedy:
    """Step groups down until the budget is met, then up again wherever a step still fits."""

    def __init__(self, scores: Mapping[str, Tensor], costs: CostModel, budget: Budget, quantity: Quantity) -> None:
        self.limit = budget.limit(costs.reference.total(quantity))
        self.spent = costs.total(quantity)
        self.kept: Counts = dict(costs.counts)
        self.ladders = {
            name: _Ladder(name, scores[name], budget.sizes_of(costs, name), costs, quantity, budget.per_cost)
            for name in costs.counts
        }

    def run(self) -> Counts:
        """Return how many units each group keeps."""
        heap = [
            (ladder.keys[0], position, ladder) for position, ladder in enumerate(self.ladders.values()) if ladder.keys
        ]
        heapq.heapify(heap)
        while self.spent > self.limit:
            _, position, ladder = heapq.heappop(heap)
            self._move(ladder, +1)
            if ladder.rung < len(ladder.keys):
                heapq.heappush(heap, (ladder.keys[ladder.rung], position, ladder))
        while fitting := [ladder for ladder in self.ladders.values() if self._fits_above(ladder)]:
            self._move(max(fitting, key=lambda ladder: ladder.keys[ladder.rung - 1]), -1)
        return self.kept

    def _fits_above(self, ladder: "_Ladder") -> bool:
        if ladder.rung == 0:
            return False
        return self.spent + ladder.cost_of(ladder.sizes[ladder.rung - 1], self.kept) <= self.limit

    def _move(self, ladder: "_Ladder", rungs: int) -> None:
        ladder.rung += rungs
        size = ladder.sizes[ladder.rung]
        self.spent += ladder.cost_of(size, self.kept)
        self.kept[ladder.name] = size


class _Ladder:
    """The sizes one group may have, and how dearly each step down is paid.

    `keys[r]` orders the step from `sizes[r]` to `sizes[r + 1]` among those of all groups: mean
    score per cost of the units that go, then the part of the group that is gone before.
    """

    def __init__(
        self, name: str, scores: Tensor, sizes: list[int], costs: CostModel, quantity: Quantity, per_cost: bool
    ) -> None:
        self.name, self.sizes = name, sizes
        self.quantity: Quantity = quantity
        self.rung = 0
        self.table = costs.latency if quantity == "latency" else None
        self.part = costs.touching(name)
        self.fixed_cost = None if self.part.touches_others(name) else self._measure(costs.counts)
        cost = max(1, self._measure(costs.counts)) if per_cost else 1
        best_first = scores.double().sort(descending=True).values
        self.keys = [
            (float(best_first[less:size].mean()) / cost, 1 - size / sizes[0]) for size, less in pairwise(sizes)
        ]

    def cost_of(self, size: int, kept: Mapping[str, int]) -> int:
        """What the model costs more with `size` units of this group than with what `kept` says."""
        if self.table is not None:  # measured times rise by steps, not by units
            return self.table.of(self.name, size) - self.table.of(self.name, kept[self.name])
        return (size - kept[self.name]) * self.unit_cost(kept)

    def unit_cost(self, kept: Mapping[str, int]) -> int:
        """What one unit of this group costs while the others keep `kept`."""
        return self._measure(kept) if self.fixed_cost is None else self.fixed_cost

    def _measure(self, kept: Mapping[str, int]) -> int:
        if self.table is not None:
            return self.table.per_unit(self.name)
        one, none = ({**kept, self.name: units} for units in (1, 0))
        return self.part.total(self.quantity, one) - self.part.total(self.quantity, none)
