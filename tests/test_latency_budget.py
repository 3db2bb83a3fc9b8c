"""Latency as a budget: the table, the search by it, and the clock that corrects it."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from main import run
from models.cost import CostModel, cost_model
from models.latency_table import LatencyTable
from prune import latency
from prune.budget import Budget
from prune.rankers.magnitude import Magnitude
from prune.search import select_units
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from utils.errors import InputError
from utils.storage import Store

STEPS = {"a": ((0, 0), (2, 10), (4, 10)), "b": ((0, 0), (1, 7), (4, 100))}


def costs_of(table: LatencyTable) -> CostModel:
    counts = {name: points[-1][0] for name, points in table.groups.items()}
    return CostModel((), counts, dict.fromkeys(counts, 1), dict.fromkeys(counts, "head"), latency=table)


def test_the_table_goes_straight_between_its_points() -> None:
    table = LatencyTable(5, STEPS, 1)
    assert [table.of("a", k) for k in range(5)] == [0, 5, 10, 10, 10] and table.of("b", 2) == 38
    assert table.at({"a": 1, "b": 4}) == 110 and table.per_unit("b") == 25
    assert LatencyTable.from_json(table.to_json()) == table


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8])
def test_the_search_never_takes_longer_and_nothing_more_fits(ratio: float) -> None:
    costs = costs_of(LatencyTable(5, STEPS, 1))
    scores = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([1.0, 2, 8, 4])}
    budget = Budget("latency", ratio, min_keep=0)
    kept = {name: len(units) for name, units in select_units(scores, costs, budget).items()}
    limit = budget.limit(costs.total("latency"))
    assert costs.total("latency", kept) <= limit
    for name in kept:
        if kept[name] < costs.counts[name]:
            assert costs.total("latency", {**kept, name: kept[name] + 1}) > limit
    assert any(costs.total("latency", {"a": a, "b": b}) <= limit for a, b in product(range(5), repeat=2))


def test_times_are_made_to_rise() -> None:
    assert latency.rising([0, 2, 4], [10.0, 30.0, 20.0]) == ((0, 0), (2, 15), (4, 15))
    assert latency.rising([0, 4], [10.0, 10.0]) == ((0, 0), (4, 0))


@dataclass
class Biased:
    """A clock by which the table is wrong: time is `factor` of what it says, above a floor."""

    table: LatencyTable
    factor: float
    dense: Any
    seen: list[float] = field(default_factory=list)

    def share(self, dense: Any, pruned: Any) -> tuple[float, tuple[float, float], float]:
        kept = {group.name: group.count for group in pruned.unit_groups()}
        whole = self.table.at({group.name: group.count for group in dense.unit_groups()})
        share = 1 - self.factor * (1 - self.table.at(kept) / whole)
        self.seen.append(share)
        return share, (share, share), 10.0


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_the_clock_corrects_a_table_that_is_wrong(factor: float) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    points = {g.name: tuple((k, 1000 * k) for k in range(g.count + 1)) for g in model.unit_groups()}
    table = LatencyTable(2000, points, 1)
    clock = Biased(table, factor, model)
    costs = replace(cost_model(model, data.example), latency=replace(table, clock=clock))
    method = Magnitude(budget="latency", ratio=0.3)
    method.check(costs)
    plan = method.plan(model, method.rank(model, data), costs)
    said = plan.details["latency"]
    assert abs(said["miss"]) <= 0.05 and plan.ratio_reached == pytest.approx(0.3, abs=0.04)
    assert said["reached_share"] in clock.seen and said["asked_ms"] == pytest.approx(7.0)
    assert len(clock.seen) == len(said["tries"]) and (factor == 1.0) == (len(clock.seen) == 1)
    assert "notes" not in plan.details


@pytest.mark.parametrize("wrong", [0.2, 1.3])
def test_one_wild_time_does_not_end_the_search(wrong: float) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    points = {g.name: tuple((k, 1000 * k) for k in range(g.count + 1)) for g in model.unit_groups()}
    table = LatencyTable(2000, points, 1)

    class Restless(Biased):
        """A clock whose first time is far off."""

        def share(self, dense: Any, pruned: Any) -> tuple[float, tuple[float, float], float]:
            share, interval, ms = super().share(dense, pruned)
            self.seen[-1] = share if len(self.seen) > 1 else wrong
            return self.seen[-1], interval, ms

    costs = replace(cost_model(model, data.example), latency=replace(table, clock=Restless(table, 0.8, model)))
    method = Magnitude(budget="latency", ratio=0.3)
    plan = method.plan(model, method.rank(model, data), costs)
    assert abs(plan.details["latency"]["miss"]) <= 0.05, plan.details["latency"]["tries"]


def test_a_miss_is_said_above_the_numbers() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    points = {g.name: tuple((k, 1000 * k) for k in range(g.count + 1)) for g in model.unit_groups()}
    table = LatencyTable(2000, points, 1)
    costs = replace(cost_model(model, data.example), latency=replace(table, clock=Biased(table, 0.05, model)))
    method = Magnitude(budget="latency", ratio=0.5)
    plan = method.plan(model, method.rank(model, data), costs)
    assert "above the 50.0% asked" in plan.details["notes"][0]


def test_too_much_is_refused_before_anything_is_ranked() -> None:
    costs = costs_of(LatencyTable(1000, STEPS, 1))
    with pytest.raises(InputError, match=r"nanoseconds of the model.*prune.ratio must be at most"):
        Magnitude(budget="latency", ratio=0.5).check(costs)
    with pytest.raises(InputError, match="no latencies were measured"):
        Magnitude(budget="latency", ratio=0.5).check(replace(costs, latency=None))


@pytest.mark.parametrize("name", ["toy_images", "resnet_bottleneck", "bert", "llama", "deit"])
def test_every_family_can_be_timed(name: str, monkeypatch) -> None:
    model, samples = ADAPTERS[name]()
    monkeypatch.setattr(latency, "LARGEST", 2)
    quick = latency.Protocol(warmup=1, blocks=1, seconds=0.001, least_calls=2)
    before = model.fingerprint()
    table = latency.measured_table(model, bundle_of(samples), quick)
    counts = {group.name: group.count for group in model.unit_groups()}
    assert {name: points[-1][0] for name, points in table.groups.items()} == counts
    for points in table.groups.values():
        assert points[0] == (0, 0) and list(points) == sorted(points)
    assert table.rest_ns >= 0 and model.fingerprint() == before


def test_a_table_of_another_device_is_not_used(tmp_path: Path, monkeypatch) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, store = bundle_of(samples), Store(tmp_path)
    made: list[int] = []
    monkeypatch.setattr(latency, "measured_table", lambda m, d: made.append(1) or LatencyTable(5, STEPS, len(made)))
    asked = partial(latency.with_latency, Magnitude(budget="latency", ratio=0.3), cost_model(model, data.example))

    def batch(dtype: torch.dtype = torch.float32) -> int:
        table = asked(model, data, store, dtype).latency
        assert table is not None and table.clock is not None and table.clock.batch == table.batch
        return table.batch

    assert [batch(), batch()] == [1, 1] and batch(torch.bfloat16) == 2, "another type of numbers is another table"
    machine, device = latency.describe_machine, latency.describe_device
    changes = {
        "describe_device": lambda d: {**device(d), "name": "another processor"},
        "describe_machine": lambda d: {**machine(d), "threads": 64},
    }
    for number, (name, change) in enumerate(changes.items(), 3):
        with monkeypatch.context() as patch:
            patch.setattr(latency, name, change)
            assert [batch(), batch()] == [number, number], name
    with monkeypatch.context() as patch:
        patch.setattr(latency, "describe_machine", lambda d: {**machine(d), "gpu": {"driver": "999.1"}})
        assert batch() == 5, "another driver"
    assert batch() == 1 and len(made) == 5, "the first device finds its own again"


@pytest.mark.slow
def test_a_run_by_latency_says_what_it_reached_and_measures_the_table_once(
    small_config: Compose, tmp_path: Path, monkeypatch
) -> None:
    quick = latency.Protocol(warmup=1, blocks=3, seconds=0.02, least_calls=6)
    monkeypatch.setattr(latency, "OF_MODELS", quick)
    monkeypatch.setattr(latency, "LARGEST", 4)
    made: list[int] = []
    measure = latency.measured_table
    monkeypatch.setattr(latency, "measured_table", lambda m, d: made.append(1) or measure(m, d, quick))
    for number, method in enumerate(("magnitude", "random")):
        chosen = (f"prune={method}", "prune.budget=latency", "prune.ratio=0.02", f"storage={tmp_path / 'storage'}")
        record = run(small_config(*chosen, "evals=[params]", "prune.min_keep=0"), tmp_path / str(number))
        said = record.to_json()["plan"]["details"]["latency"]
        assert said["reached_share_interval"] and said["batch"] <= 4 and record.plan
        assert record.plan.ratio_reached == pytest.approx(1 - said["reached_share"])
    assert made == [1], "the second run finds the table in the storage"
