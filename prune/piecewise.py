"""The latency search of Kwon et al. (NeurIPS 2022, arXiv:2204.09656): flat-then-linear times, whole groups dropped.

A table says how long a group takes with n units. A line with one knee stands for it: units up to the knee are free
once the group is there at all. So whole groups are dropped first, the weakest of each kind, and what time is left goes
to the best units beyond the knees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.cost import CostModel
from prune.budget import Budget, refuse_unreachable
from utils.errors import InputError


class Knee(NamedTuple):
    """`constant` up to `knee` units, then `slope` more for each: of the table's unit of time.

    Attributes:
        knee: Units that cost nothing more.
        constant: Time of a group that is there.
        slope: Not negative.
    """

    knee: int
    constant: float
    slope: float

    def at(self, units: int) -> float:
        """Time of so many units; none take none."""
        return self.constant + self.slope * max(0, units - self.knee) if units else 0.0


def fitted(points: Sequence[tuple[int, float]]) -> Knee:
    """The line with one knee that comes nearest to measured times.

    For each measured number of units t as the knee: the constant is the mean of the times up to it, the slope that of
    the best line through the knee for those beyond, at least 0. The t with the smallest squared error is taken, of
    equal ones the smallest.

    Args:
        points: Pairs of units and time, ascending; pairs without units are left out.

    Raises:
        InputError: If nothing was measured.
    """
    rows = [(n, float(time)) for n, time in points if n > 0]
    if not rows:
        raise InputError("prune.budget=latency: the table has no times of this group")
    found = []
    for position, (knee, _) in enumerate(rows):
        constant = sum(time for _, time in rows[: position + 1]) / (position + 1)
        beyond = rows[position + 1 :]
        over = sum((n - knee) * (time - constant) for n, time in beyond)
        under = sum((n - knee) ** 2 for n, _ in beyond)
        line = Knee(knee, constant, max(0.0, over / under) if under else 0.0)
        found.append((sum((line.at(n) - time) ** 2 for n, time in rows), line))
    return min(found, key=lambda pair: (pair[0], pair[1].knee))[1]


@dataclass(frozen=True)
class _Group:
    """What the search knows of one group: its best units that come together, and the others."""

    name: str
    order: list[int]
    scores: Tensor
    base: int
    base_time: float
    slope: float

    @property
    def strength(self) -> float:
        return float(self.scores[: self.base].sum())


def two_kinds_in_time(scores: Mapping[str, Tensor], costs: CostModel, budget: Budget) -> dict[str, Tensor]:
    """Drop the weakest groups of each kind, and give the time that is left to the best units of the others.

    Every number of groups dropped, of either kind, is tried, and with it every number of extra units of the first
    kind, with as many of the second as then fit; the selection with the largest sum of scores, the units up to the
    knees included, is taken.

    Args:
        scores: Per group (count,), higher means keep, comparable within a kind.
        costs: With a table of latencies.
        budget: What has to go, of latency; groups are dropped only if `min_keep` is 0.

    Returns:
        Ascending indices of the kept units per group, int64.

    Raises:
        InputError: If the model has other than one or two kinds of units, nothing was measured, or the fitted lines
            leave no selection within the budget.
    """
    refuse_unreachable(costs, budget)
    if costs.latency is None or budget.of != "latency" or budget.round_to > 1:
        raise InputError("prune.search=optin: takes a table of latencies, and prune.round_to=1")
    kinds = list(dict.fromkeys(costs.kinds.values()))
    if not 1 <= len(kinds) <= 2:
        raise InputError(f"prune.search=optin: takes a model with one or two kinds of units, not {', '.join(kinds)}")
    free = [[_group(n, scores[n], costs, budget) for n in _free(costs, budget, kind)] for kind in kinds]
    first, second = [*free, []][:2]
    held = {group.name for group in [*first, *second]}
    fixed = [name for name in costs.counts if name not in held]
    limit = budget.limit(costs.reference.total("latency"))
    room = limit - costs.latency.rest_ns - sum(costs.latency.of(n, costs.counts[n]) for n in fixed)
    kept = _best(first, second, room, budget.min_keep == 0)
    if kept is None:
        raise InputError(
            f"prune.ratio={budget.ratio}: by the lines fitted to the table no selection stays within {limit:,} "
            f"nanoseconds; prune.ratio must be smaller{', or prune.min_keep 0' if budget.min_keep else ''}"
        )
    whole = {name: torch.arange(costs.counts[name]) for name in fixed}
    return {name: whole[name] if name in whole else kept[name] for name in costs.counts}


def _free(costs: CostModel, budget: Budget, kind: str) -> list[str]:
    names = [name for name, k in costs.kinds.items() if k == kind and costs.counts[name]]
    return [name for name in names if len(budget.sizes_of(costs, name)) > 1]


def _group(name: str, scores: Tensor, costs: CostModel, budget: Budget) -> _Group:
    assert costs.latency is not None
    line = fitted(costs.latency.groups[name])
    base = min(costs.counts[name], max(line.knee, budget.min_keep))
    order = scores.double().argsort(descending=True, stable=True)
    return _Group(name, order.tolist(), scores.double()[order], base, line.at(base), line.slope)


class _Extras:
    """Units beyond the knees of one kind's groups, from best to worst."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        rows = [(-float(g.scores[i]), at, g.order[i], g.slope) for at, g in enumerate(groups)
                for i in range(g.base, len(g.order))]  # fmt: skip
        self.rows = sorted(rows, key=lambda row: row[:2])
        self.owner = torch.tensor([row[1] for row in self.rows], dtype=torch.int64)
        self.scores, self.times = (
            torch.tensor([sign * row[at] for row in self.rows], dtype=torch.float64) for sign, at in ((-1, 0), (1, 3))
        )

    def of(self, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the groups that are alive, and sums of scores and times of the first ones of them."""
        chosen = alive[self.owner].nonzero().flatten()
        zero = torch.zeros(1, dtype=torch.float64)
        sums = [torch.cat([zero, values[chosen].cumsum(0)]) for values in (self.scores, self.times)]
        return chosen, sums[0], sums[1]


def _best(first: Sequence[_Group], second: Sequence[_Group], room: float, droppable: bool) -> dict[str, Tensor] | None:
    """The best selection within the room, over all numbers of dropped groups."""
    extras = _Extras(first), _Extras(second)
    best, best_sum = None, float("-inf")
    for one in _survivors(first, droppable):
        for other in _survivors(second, droppable):
            alive = [
                g for groups, mask in ((first, one), (second, other)) for g, m in zip(groups, mask, strict=True) if m
            ]
            left = room - sum(group.base_time for group in alive)
            if left < 0:
                continue
            (rows, sums, times), (others, other_sums, other_times) = extras[0].of(one), extras[1].of(other)
            fits = int((times <= left).sum())  # ascending: no unit takes negative time
            beside = torch.searchsorted(other_times, left - times[:fits], right=True) - 1
            totals = sums[:fits] + other_sums[beside]
            count = int(totals.argmax())
            total = float(totals[count]) + sum(group.strength for group in alive)
            if total > best_sum:
                best_sum = total
                best = (
                    alive,
                    [extras[0].rows[i] for i in rows[:count]],
                    [extras[1].rows[i] for i in others[: int(beside[count])]],
                )
    if best is None:
        return None
    kept = {group.name: [] for group in [*first, *second]} | {g.name: g.order[: g.base] for g in best[0]}
    for groups, rows_taken in ((first, best[1]), (second, best[2])):
        for _, at, unit, _ in rows_taken:
            kept[groups[at].name].append(unit)
    return {name: torch.tensor(sorted(units), dtype=torch.int64) for name, units in kept.items()}


def _survivors(groups: Sequence[_Group], droppable: bool) -> list[Tensor]:
    """Masks without none, one, two, ... of the weakest groups; one group at least stays."""
    weakest = sorted(range(len(groups)), key=lambda at: groups[at].strength)
    masks = []
    for dropped in range(max(1, len(groups)) if droppable else 1):
        mask = torch.ones(len(groups), dtype=torch.bool)
        mask[weakest[:dropped]] = False
        masks.append(mask)
    return masks
