"""How many neurons each MLP keeps, and which: pure functions over scores and costs.

A fraction p of m neurons removes `floor(p m)` of them, as published; with `round_to` what is kept
goes down to the next multiple.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import floor

from torch import Tensor

from models.cost import CostModel, Length, Term
from prune.budget import Budget, Budgeted
from prune.search import select_units

Counts = dict[str, int]


def removed_of(ratio: float, count: int) -> int:
    """`floor(ratio * count)` in exact numbers: 0.29 of 100 are 29."""
    return floor(Fraction(str(ratio)) * count)


def same_fraction(counts: Mapping[str, int], ratio: float, round_to: int) -> Counts:
    """What every group keeps when each loses the same fraction."""
    return {name: rounded_down(count - removed_of(ratio, count), count, round_to) for name, count in counts.items()}


def rounded_down(kept: int, count: int, round_to: int) -> int:
    """The next multiple of `round_to` below a number of neurons; all of them stay as many as they are."""
    return kept if kept == count else kept // round_to * round_to


def fitting_fraction(
    counts: Mapping[str, int], costs: CostModel, quantity: Budgeted, ratio: float, round_to: int
) -> Counts | None:
    """The largest common fraction at which the whole model costs no more than it may; None if none does.

    Args:
        counts: Neurons of every group that may lose some.
        costs: Cost of the model; the other groups stay whole.
        quantity: `macs` or `params`.
        ratio: Fraction of it to remove.
        round_to: What is kept is a multiple of this.
    """
    assert quantity != "width"
    limit, widest = Budget(quantity, ratio).limit(costs.total(quantity)), max(counts.values())
    for less in range(widest):
        kept = {
            name: rounded_down(count - floor(Fraction(less, widest) * count), count, round_to)
            for name, count in counts.items()
        }
        if min(kept.values()) > 0 and costs.total(quantity, {**costs.counts, **kept}) <= limit:
            return kept
    return None


def best_of_each(scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """The neurons with the highest scores, of equal ones the earlier, ascending; per group (kept,)."""
    orders = {name: values.argsort(descending=True, stable=True) for name, values in scores.items()}
    return {name: order[: kept[name]].sort().values for name, order in orders.items()}


def best_of_all(scores: Mapping[str, Tensor], ratio: float, min_keep: int, round_to: int) -> dict[str, Tensor]:
    """The neurons with the highest scores over all groups: `floor(ratio * all)` of them go.

    Args:
        scores: Per group (N,), comparable between groups.
        ratio: Fraction of all neurons to remove.
        min_keep: Neurons kept at least in every group.
        round_to: What a group keeps is a multiple of this.
    """
    counts = {name: len(values) for name, values in scores.items()}
    total = sum(counts.values())
    exactly = Fraction(removed_of(ratio, total), total)
    return select_units(scores, neurons_alone(counts), Budget("params", exactly, min_keep, round_to))


def neurons_alone(counts: Mapping[str, int]) -> CostModel:
    """A cost model in which every neuron costs one and nothing else costs anything."""
    terms = tuple(Term(macs=1, params=1, lengths=(Length(0, ((name, 1),)),)) for name in counts)
    return CostModel(terms, dict(counts), dict.fromkeys(counts, 1), dict.fromkeys(counts, "neuron"))
