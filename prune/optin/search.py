"""OPTIN's search: the top heads globally, and the best neurons that still fit, for every number of heads.

The search of Kwon et al. (2022, arXiv:2204.09656), with prefix sums over both rankings.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.cost import CostModel
from prune.budget import Budget, refuse_unreachable
from utils.errors import InputError

Unit = tuple[str, int]


class Ladder(NamedTuple):
    """Units of one kind from best to worst, the protected ones first.

    Attributes:
        units: Group and index of each.
        sums: Sums of the scores of the first ones, (units + 1,) float64.
        least: How many are protected.
        price: What one costs.
    """

    units: list[Unit]
    sums: Tensor
    least: int
    price: int


NOTHING = Ladder([], torch.zeros(1, dtype=torch.float64), 0, 1)


def two_kinds(scores: Mapping[str, Tensor], costs: CostModel, budget: Budget) -> dict[str, Tensor]:
    """Keep the top h heads and the neurons that fit beside them, for the h with the largest sum of scores.

    `m(h) = floor((limit - fixed - h * head) / neuron)`; an h that does not fit is skipped.
    Units that the floors protect are taken first.

    Args:
        scores: Per group (count,), higher means keep, comparable within a kind.
        costs: The model's costs; within a kind every unit must cost the same.
        budget: What has to go, of MACs or parameters.

    Returns:
        Ascending indices of the kept units per group, int64.

    Raises:
        InputError: If the model has other than one or two kinds of units, units of one kind
            differ in cost, the budget is of another sort, or it can't be reached.
    """
    refuse_unreachable(costs, budget)
    if budget.of in ("width", "latency") or budget.round_to > 1:
        raise InputError(
            "prune.search=optin: takes prune.budget=macs or params, and prune.round_to=1; "
            f"here they are {budget.of} and {budget.round_to}"
        )
    kinds = list(dict.fromkeys(costs.kinds.values()))
    if not 1 <= len(kinds) <= 2:
        raise InputError(f"prune.search=optin: takes a model with one or two kinds of units, not {', '.join(kinds)}")
    first, second = [*(_ladder(scores, costs, budget, kind) for kind in kinds), NOTHING][:2]
    room = budget.limit(costs.reference.total(budget.of)) - costs.total(budget.of, dict.fromkeys(costs.counts, 0))
    heads = _best_number(first, second, room)
    return _by_group([*first.units[:heads], *second.units[: _beside(heads, first, second, room)]], costs)


def _beside(count: int, first: Ladder, second: Ladder, room: int) -> int:
    """How many of the second kind fit beside `count` of the first."""
    return min(len(second.units), (room - count * first.price) // second.price)


def _best_number(first: Ladder, second: Ladder, room: int) -> int:
    """How many of the first kind to keep; the fewest of those with the largest sum."""
    best, best_sum = first.least, float("-inf")
    for count in range(first.least, len(first.units) + 1):
        others = _beside(count, first, second, room)
        if others < second.least:
            break
        total = float(first.sums[count] + second.sums[others])
        if total > best_sum:
            best, best_sum = count, total
    return best


def _price(costs: CostModel, budget: Budget, kind: str) -> int:
    """What a unit of a kind costs; refused where it depends on the group or on other groups."""
    found = set()
    for name in (name for name, k in costs.kinds.items() if k == kind and costs.counts[name]):
        part = costs.touching(name)
        if part.touches_others(name):
            raise InputError(f"prune.search=optin: what a {kind} of {name} costs depends on other groups")
        fewer = costs.counts | {name: costs.counts[name] - 1}
        found.add(costs.total(budget.of) - costs.total(budget.of, fewer))  # type: ignore[arg-type]
    if len(found) > 1:
        raise InputError(f"prune.search=optin: every {kind} must cost the same, here {min(found):,} to {max(found):,}")
    return found.pop() if found else 1


def _ladder(scores: Mapping[str, Tensor], costs: CostModel, budget: Budget, kind: str) -> Ladder:
    protected: list[tuple[float, Unit]] = []
    free: list[tuple[float, Unit]] = []
    for name in (name for name, k in costs.kinds.items() if k == kind):
        values = scores[name].double()
        order = values.argsort(descending=True, stable=True).tolist()
        least = budget.sizes_of(costs, name)[-1]
        protected += [(float(values[unit]), (name, unit)) for unit in order[:least]]
        free += [(float(values[unit]), (name, unit)) for unit in order[least:]]
    ordered = [*protected, *sorted(free, key=lambda pair: -pair[0])]
    sums = torch.tensor([0.0, *(score for score, _ in ordered)], dtype=torch.float64).cumsum(0)
    return Ladder([unit for _, unit in ordered], sums, len(protected), _price(costs, budget, kind))


def _by_group(units: Iterable[Unit], costs: CostModel) -> dict[str, Tensor]:
    kept: dict[str, list[int]] = {name: [] for name in costs.counts}
    for name, unit in units:
        kept[name].append(unit)
    return {name: torch.tensor(sorted(found), dtype=torch.int64) for name, found in kept.items()}
