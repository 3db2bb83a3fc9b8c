"""The search meets its budget exactly, to one unit, whatever the scores."""

import itertools

import pytest
import torch
from torch import Tensor

from models.cost import CostModel, Length, Term, cost_model
from models.toy_encoder import toy_encoder
from prune.budget import Budget, Budgeted, ratio_of, refuse_unreachable
from prune.search import select_units
from tests.adapters import ADAPTERS, batch
from utils.errors import InputError, RunError


def costs_of(**groups: tuple[int, int]) -> CostModel:
    """Independent groups given as `name=(count, MACs a unit)`, and 100 MACs that always stay."""
    terms = [Term(macs=cost, params=cost, lengths=(Length(0, ((name, 1),)),)) for name, (_, cost) in groups.items()]
    terms.append(Term(macs=100, params=100, lengths=(Length(1),)))
    return CostModel(tuple(terms), {n: count for n, (count, _) in groups.items()}, dict.fromkeys(groups, 1))


def spent(costs: CostModel, kept: dict[str, Tensor], of: str = "macs") -> int:
    return costs.total(of, {name: len(index) for name, index in kept.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("scores", ["random", "ties"])
def test_budget_is_met_and_nothing_more_would_fit(name: str, of: str, scores: str) -> None:
    model, samples = ADAPTERS[name]()
    costs = cost_model(model, {key: tensor[:1] for key, tensor in samples.items()})
    generator = torch.Generator().manual_seed(3)
    values = {
        g: torch.rand(n, generator=generator) if scores == "random" else torch.ones(n) for g, n in costs.counts.items()
    }
    for ratio in (0.0, 0.1, 0.25, 0.4):
        budget = Budget(of, ratio)  # type: ignore[arg-type]
        limit = budget.limit(costs.total(of))  # type: ignore[arg-type]
        if costs.total(of, dict.fromkeys(costs.counts, 1)) > limit:  # type: ignore[arg-type]
            with pytest.raises(InputError, match="reachable"):
                select_units(values, costs, budget)
            continue
        kept = select_units(values, costs, budget)
        assert spent(costs, kept, of) <= limit
        counts = {group: len(index) for group, index in kept.items()}
        for group, count in counts.items():
            if count < costs.counts[group]:
                assert costs.total(of, counts | {group: count + 1}) > limit  # type: ignore[arg-type]
        for group, index in kept.items():
            gone = sorted(set(range(costs.counts[group])) - set(index.tolist()))
            if gone and len(index):
                assert values[group][gone].max() <= values[group][index].min()


def test_greedy_equals_the_best_of_all_plans_when_units_cost_the_same() -> None:
    costs = costs_of(a=(4, 10), b=(4, 10))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = {name: torch.rand(4, generator=generator) for name in "ab"}
        kept = select_units(scores, costs, Budget("macs", 0.25, min_keep=0))
        found = sum(float(scores[name][index].sum()) for name, index in kept.items())
        flat = torch.cat([scores["a"], scores["b"]])
        size = sum(len(index) for index in kept.values())
        best = max(float(flat[list(chosen)].sum()) for chosen in itertools.combinations(range(8), size))
        assert size == 3 and found == pytest.approx(best)


def test_score_per_cost_decides_between_groups() -> None:
    costs = costs_of(cheap=(3, 1), dear=(3, 100))
    scores = {"cheap": torch.tensor([0.5, 0.6, 0.7]), "dear": torch.tensor([1.0, 2.0, 3.0])}
    kept = select_units(scores, costs, Budget("macs", 0.2, min_keep=0))
    assert kept["cheap"].tolist() == [0, 1, 2] and kept["dear"].tolist() == [1, 2]


def test_score_alone_decides_without_per_cost() -> None:
    costs = costs_of(cheap=(3, 1), dear=(3, 100))
    scores = {"cheap": torch.tensor([0.5, 0.6, 0.7]), "dear": torch.tensor([0.1, 2.0, 3.0])}
    kept = select_units(scores, costs, Budget("macs", 0.2, min_keep=0, per_cost=False))
    assert kept["cheap"].tolist() == [0, 1, 2] and kept["dear"].tolist() == [1, 2]
    scores["dear"] += 1
    kept = select_units(scores, costs, Budget("macs", 0.005, min_keep=0, per_cost=False))
    assert len(kept["cheap"]) < 3 and len(kept["dear"]) == 3


def test_a_removed_unit_comes_back_if_it_still_fits() -> None:
    costs = costs_of(cheap=(4, 1), dear=(1, 100))
    scores = {"cheap": torch.full((4,), 0.001), "dear": torch.tensor([0.5])}
    kept = select_units(scores, costs, Budget("macs", 0.3, min_keep=0))
    assert len(kept["dear"]) == 0
    assert len(kept["cheap"]) == 4, "removing the dear unit makes room for the cheap ones again"


def test_ties_are_spread_over_groups_and_keep_the_first_units() -> None:
    costs = costs_of(a=(8, 10), b=(8, 10))
    scores = {"a": torch.ones(8), "b": torch.ones(8)}
    kept = select_units(scores, costs, Budget("params", 0.3, min_keep=0))
    assert kept["a"].tolist() == kept["b"].tolist() == [0, 1, 2, 3]


def test_floor_is_kept() -> None:
    costs = costs_of(bad=(6, 10), good=(6, 10))
    scores = {"bad": torch.zeros(6), "good": torch.ones(6)}
    for floor in (0, 1, 3):
        kept = select_units(scores, costs, Budget("macs", 0.25, min_keep=floor))
        assert len(kept["bad"]) == max(floor, 0) and len(kept["good"]) == 6 - floor


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.4])
@pytest.mark.parametrize("round_to", [3, 4, 8])
def test_alignment_holds_and_the_budget_too(ratio: float, round_to: int) -> None:
    costs = costs_of(a=(22, 7), b=(16, 11))
    generator = torch.Generator().manual_seed(1)
    scores = {name: torch.rand(count, generator=generator) for name, count in costs.counts.items()}
    budget = Budget("macs", ratio, round_to=round_to)
    kept = {name: len(index) for name, index in select_units(scores, costs, budget).items()}
    assert costs.total("macs", kept) <= budget.limit(costs.total("macs"))
    for name, size in kept.items():
        allowed = budget.sizes(costs.counts[name], 1)
        assert size == costs.counts[name] or size % round_to == 0
        larger = [s for s in allowed if s > size]
        if larger:
            assert costs.total("macs", kept | {name: larger[-1]}) > budget.limit(costs.total("macs"))


def test_alignment_counts_features_not_units() -> None:
    assert Budget("macs", 0.5, round_to=8).sizes(count=4, width=16) == [4, 3, 2, 1]
    assert Budget("macs", 0.5, round_to=8).sizes(count=6, width=4) == [6, 4, 2]
    assert Budget("macs", 0.5, round_to=8).sizes(count=20, width=1) == [20, 16, 8]
    assert Budget("macs", 0.5, round_to=8, min_keep=0).sizes(count=20, width=1) == [20, 16, 8, 0]
    assert Budget("macs", 0.5, round_to=64).sizes(count=20, width=1) == [20]


def test_width_removes_the_same_fraction_everywhere() -> None:
    costs = costs_of(a=(10, 1), b=(4, 100))
    scores = {"a": torch.arange(10.0), "b": torch.arange(4.0)}
    for ratio, sizes in ((0.0, [10, 4]), (0.5, [5, 2]), (0.3, [7, 2]), (0.75, [2, 1])):
        kept = select_units(scores, costs, Budget("width", ratio))
        assert [len(kept["a"]), len(kept["b"])] == sizes
        assert kept["a"].tolist() == list(range(10 - sizes[0], 10))
    assert ratio_of(costs, Budget("width", 0.5), {"a": 5, "b": 2}) == 0.5


def test_ratios_are_taken_as_written() -> None:
    costs = costs_of(a=(10, 1))
    kept = select_units({"a": torch.arange(10.0)}, costs, Budget("width", 0.9))
    assert len(kept["a"]) == 1, "1 - 0.9 of ten units is one unit although 10 * (1 - 0.9) < 1 in floats"


@pytest.mark.parametrize("of", ["macs", "params", "width"])
def test_an_unreachable_budget_names_the_reachable_minimum(of: str) -> None:
    costs = costs_of(a=(10, 10), b=(10, 20))
    scores = {name: torch.rand(10) for name in "ab"}
    budget = Budget(of, 0.95, min_keep=2)  # type: ignore[arg-type]
    least = "2" if of == "width" else "160"
    largest = "0.8" if of == "width" else "0.6"
    with pytest.raises(
        InputError, match=rf"prune.ratio=0.95.* minimum is {least}; prune.ratio must be at most {largest}"
    ):
        select_units(scores, costs, budget)
    select_units(scores, costs, Budget(of, float(largest), min_keep=2))  # type: ignore[arg-type]


def test_scores_that_do_not_fit_are_refused() -> None:
    costs = costs_of(a=(3, 1))
    with pytest.raises(RunError, match=r"scores of a: found \(2,\); must be \(3,\)"):
        select_units({"a": torch.ones(2)}, costs, Budget("macs", 0.1))
    with pytest.raises(RunError, match="scores of a: found nothing"):
        select_units({}, costs, Budget("macs", 0.1))


@pytest.mark.parametrize("of", ["macs", "params", "width"])
def test_only_the_kinds_asked_for_go(of: Budgeted) -> None:
    model = toy_encoder(classes=10, image_size=8, width=24, depth=2, heads=4, neurons=20)
    costs = cost_model(model, batch(1, 8, 8, samples=1))
    scores = {g.name: torch.arange(g.count, dtype=torch.float32) for g in model.unit_groups()}
    kept = select_units(scores, costs, Budget(of, 0.2, kinds=("neuron",)))
    lengths = {name: len(index) for name, index in kept.items()}
    assert all(lengths[n] == costs.counts[n] for n, kind in costs.kinds.items() if kind == "head")
    assert all(lengths[n] < costs.counts[n] for n, kind in costs.kinds.items() if kind == "neuron")
    if of == "width":
        assert ratio_of(costs, Budget("width", 0.2, kinds=("neuron",)), lengths) == pytest.approx(0.2), (
            "heads do not count"
        )


def test_unknown_and_unreachable_kinds_are_refused() -> None:
    model = toy_encoder(classes=10, image_size=8)
    costs = cost_model(model, batch(1, 8, 8, samples=1))
    with pytest.raises(InputError, match="no 'channel'; it has head, neuron"):
        refuse_unreachable(costs, Budget("macs", 0.1, kinds=("channel",)))
    with pytest.raises(InputError, match="must be at most .* or more kinds allowed"):
        refuse_unreachable(costs, Budget("macs", 0.9, kinds=("head",)))
