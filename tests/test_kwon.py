"""Kwon et al.: gradients, rearrangement and searches against enumeration; the method in runs, sweeps and rounds."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from main import run
from models.base import PrunableModel
from models.cost import CostModel, cost_model
from models.latency_table import LatencyTable
from prune.base import Plan
from prune.budget import Budget
from prune.optin.search import two_kinds
from prune.piecewise import Knee, fitted, two_kinds_in_time
from prune.rankers.activation import Activation
from prune.rankers.fisher import Fisher
from prune.rankers.kwon import Kwon
from prune.rankers.optin import Optin
from prune.rankers.random import Random
from prune.ranking import ranked
from prune.repair.gradients import GateGradients, kept_gradients
from prune.repair.rearrange import group_cost, rearranged, rearranged_plan
from prune.rewriting import applied
from prune.structural import TEACHER
from prune.surgery import cut
from prune.whole.rows import GlobalRows
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from utils.errors import InputError
from utils.storage import Store


def slow_fisher(model: PrunableModel, batches: list, task, size: int) -> dict[str, Tensor]:
    """Sum over mini-batches of (sum over the unit's columns of weight times gradient), squared."""
    samples = {n: torch.cat([b[n] for b in batches]) for n in batches[0]}
    scores = {g.name: torch.zeros(g.count) for g in model.unit_groups()}
    for start in range(0, len(samples["labels"]), size):
        batch = {name: tensor[start : start + size] for name, tensor in samples.items()}
        model.network.zero_grad()
        task.loss(model.logits(batch), batch).backward()
        for g in model.unit_groups():
            weight = model.network.get_parameter(f"{g.consumer.module}.weight")
            assert weight.grad is not None
            for unit in range(g.count):
                product_of = (weight * weight.grad).index_select(g.consumer.weight_dim, g.consumer.index[unit])
                scores[g.name][unit] += float(product_of.detach().sum()) ** 2
    model.network.zero_grad()
    return scores


@pytest.mark.parametrize("name", ["toy_images", "bert", "deit"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_scores_are_squared_gradients_of_mini_batches(name: str, size: int) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    found = Kwon(batch_size=size).rank(model, data).only()
    slow = slow_fisher(model, list(data.calibration), data.task, size)
    for group, values in slow.items():
        torch.testing.assert_close(found[group], values, rtol=1e-3, atol=1e-6)
    other = Kwon(batch_size=3).rank(model, data).only()
    assert any(not torch.allclose(found[g], other[g], rtol=1e-2) for g in found), "the batch size must matter"


def test_the_mini_batches_are_part_of_the_key(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, store = bundle_of(samples), Store(tmp_path)
    methods = [Kwon(), Kwon(batch_size=2), Kwon(batch_size=3), Kwon(replacement=True), Kwon(replacement=True, seed=1)]
    found = [ranked(method, model, data, store) for method in methods]
    assert len({ranking.fingerprint for ranking in found}) == 5 and not any(r.hit for r in found)
    same = (Kwon(seed=4), Kwon(ratio=0.1, repair=(), rearrange=False, search="greedy", min_keep=1))
    assert all(ranked(method, model, data, store).hit for method in same)


def test_gradients_are_kept_once_for_ranking_and_rearrangement(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, store = bundle_of(samples), Store(tmp_path)
    method = Kwon(ratio=0.3, batch_size=2)
    scores = ranked(method, model, data, store).scores.only()
    before = sorted(tmp_path.rglob("gradients-*.safetensors"))
    found = kept_gradients(method.gradients(), model, data, store)
    assert len(before) == 1 and sorted(tmp_path.rglob("gradients-*.safetensors")) == before
    for name, values in found.items():
        assert values.shape[0] == 3
        torch.testing.assert_close(values.square().sum(0), scores[name])
    drawn = GateGradients(replacement=True, batch_size=2).grouped(data).calibration
    assert sum(len(batch["labels"]) for batch in drawn) == 6


def slow_rearrangement(g: Tensor, kept: list[int]) -> list[int]:
    """The published steps, with the cost of every choice summed anew."""

    def cost(units: list[int]) -> float:
        return float(sum((g[:, u] for u in units), torch.zeros(len(g)).double()).square().sum())

    gone = [u for u in range(g.shape[1]) if u not in kept]
    for unit in sorted(kept, key=lambda u: float(g[:, u].square().sum())):
        gone = [*gone, unit]
        gone = min(([u for u in gone if u != out] for out in reversed(gone)), key=cost)
    return sorted(set(range(g.shape[1])) - set(gone))


@pytest.mark.parametrize("seed", range(12))
def test_rearrangement_follows_the_published_steps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, batches = 3 + seed % 5, 1 + seed % 4
    g = torch.randn(batches, count, generator=generator, dtype=torch.float64)
    for keep in range(count + 1):
        kept = g.square().sum(0).argsort(descending=True)[:keep].sort().values
        found = rearranged(g, kept)
        assert found.tolist() == (slow_rearrangement(g, kept.tolist()) if 0 < keep < count else kept.tolist())
        assert group_cost(g, found) <= group_cost(g, kept) + 1e-9
        best = min(group_cost(g, torch.tensor(c).long()) for c in combinations(range(count), keep))
        assert group_cost(g, found) >= best - 1e-9


def test_rearrangement_finds_units_that_cancel() -> None:
    g = torch.tensor([[1.0, 1.0, -1.0, 5.0], [2.0, 2.0, -2.0, 5.0]])
    found = rearranged(g, torch.tensor([2, 3]))
    assert found.tolist() in ([0, 3], [1, 3]) and group_cost(g, found) == 0
    assert group_cost(g, torch.tensor([2, 3])) == 20


def test_any_plan_is_rearranged_with_its_counts(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data, costs = bundle_of(samples), cost_model(model, bundle_of(samples).example)
    method = Random(ratio=0.3, rearrange=True)
    plan = method.plan(model, method.rank(model, data), costs)
    done = applied(method, model, plan, data, Store(tmp_path))
    assert [len(g.kept) for g in done.plan.groups] == [len(g.kept) for g in plan.groups]
    facts = done.plan.details["rearranged"]
    assert facts["swapped"] > 0 and facts["cost_after"] < facts["cost_before"]
    for group in done.plan.groups:
        assert done.model.origin[group.name].tolist() == list(group.kept)
    gradients = kept_gradients(GateGradients(), model, data, Store(tmp_path))
    assert rearranged_plan(plan, gradients).groups == done.plan.groups


def latencies(groups: dict[str, list[int]], rest: int = 0) -> CostModel:
    """Costs of heads `h*` and neurons `n*` from times at every number of units."""
    points = {name: tuple(enumerate([0, *times])) for name, times in groups.items()}
    counts = {name: len(times) for name, times in groups.items()}
    kinds = {name: "head" if name.startswith("h") else "neuron" for name in groups}
    return CostModel((), counts, dict.fromkeys(counts, 1), kinds, latency=LatencyTable(rest, points, 1))


def slow_fit(times: list[float]) -> tuple[float, Knee]:
    found = []
    for t in range(1, len(times) + 1):
        c = sum(times[:t]) / t
        xs = [(n - t, y - c) for n, y in enumerate(times, 1) if n > t]
        a = max(0.0, sum(x * y for x, y in xs) / sum(x * x for x, _ in xs)) if xs else 0.0
        error = sum(((c if n <= t else c + a * (n - t)) - y) ** 2 for n, y in enumerate(times, 1))
        found.append((error, Knee(t, c, a)))
    return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_fit_is_the_best_of_all_knees(seed: int) -> None:
    draw = random.Random(seed)
    times = sorted(draw.uniform(5, 30) for _ in range(2 + seed))
    line, (error, slow) = fitted(list(enumerate([0.0, *times]))), slow_fit(times)
    assert sum((line.at(n) - y) ** 2 for n, y in enumerate(times, 1)) == pytest.approx(error)
    assert line.knee == slow.knee and line.slope == pytest.approx(slow.slope)


def test_the_fit_of_plain_shapes() -> None:
    assert fitted([(0, 0), (1, 7), (2, 7), (3, 7), (4, 9), (5, 11)]) == (3, 7.0, 2.0)
    flat = fitted([(1, 4), (2, 4), (3, 4)])
    assert flat.slope == 0 and flat.at(3) == 4 and flat.at(0) == 0
    assert fitted([(1, 9), (2, 5), (3, 1)]).slope == 0, "times that fall have no slope"
    assert fitted([(4, 8)]) == (4, 8.0, 0.0)
    with pytest.raises(InputError, match="no times"):
        fitted([(0, 0)])


def selections(scores: dict[str, Tensor], costs: CostModel, limit: float) -> Iterator[float]:
    """Sums of scores of all that the published loops look at and that fits."""
    assert costs.latency is not None
    lines = {name: fitted(costs.latency.groups[name]) for name in costs.counts}
    by_kind = [[n for n in costs.counts if n[0] == kind] for kind in "hn"]
    order = {name: scores[name].sort(descending=True).values.tolist() for name in scores}
    weakest = [sorted(names, key=lambda n: sum(order[n][: lines[n].knee])) for names in by_kind]
    for p, q in product(range(len(by_kind[0])), range(len(by_kind[1]))):
        alive = [weakest[0][p:], weakest[1][q:]]
        base = sum(lines[n].constant for n in chain(*alive))
        strength = sum(sum(order[n][: lines[n].knee]) for n in chain(*alive))
        extras = [
            sorted(((s, lines[n].slope) for n in names for s in order[n][lines[n].knee :]), reverse=True)
            for names in alive
        ]
        for h, m in product(range(len(extras[0]) + 1), range(len(extras[1]) + 1)):
            taken = [*extras[0][:h], *extras[1][:m]]
            if base + sum(slope for _, slope in taken) <= limit:
                yield strength + sum(score for score, _ in taken)


@pytest.mark.parametrize("seed", range(10))
def test_the_latency_search_is_the_best_of_all_that_is_looked_at(seed: int) -> None:
    draw = random.Random(seed)
    groups = {f"{kind}{layer}": sorted(draw.randint(20, 90) for _ in range(size))
              for layer in range(3) for kind, size in (("h", 3), ("n", 5))}  # fmt: skip
    costs = latencies(groups, rest=40)
    scores = {name: torch.tensor([draw.random() for _ in times]) for name, times in groups.items()}
    for ratio in (0.0, 0.2, 0.5, 0.7):
        budget = Budget("latency", ratio, min_keep=0)
        found = two_kinds_in_time(scores, costs, budget)
        limit = budget.limit(costs.total("latency")) - 40
        best = max(selections(scores, costs, limit))
        assert sum(float(scores[n][units].sum()) for n, units in found.items()) == pytest.approx(best)
        lines = {name: fitted(costs.latency.groups[name]) for name in groups}  # type: ignore[union-attr]
        assert sum(lines[n].at(len(units)) for n, units in found.items()) <= limit + 1e-6


def test_units_that_come_for_nothing_count_when_groups_are_dropped() -> None:
    # by extra units alone (the released objective) dropping h0 would cost nothing: none has any
    costs = latencies({"h0": [10, 10], "h1": [10, 10], "n0": [5, 10, 15, 20], "n1": [5, 10, 15, 20]})
    scores = {"h0": torch.tensor([9.0, 9]), "h1": torch.tensor([1.0, 1]), "n0": torch.arange(4.0), "n1": torch.ones(4)}
    found = two_kinds_in_time(scores, costs, Budget("latency", 0.25, min_keep=0))
    assert found["h0"].tolist() == [0, 1]
    floors = two_kinds_in_time(scores, costs, Budget("latency", 0.25, min_keep=1))
    assert all(len(units) for units in floors.values())


def test_flat_times_divide_by_nothing_and_the_impossible_is_said() -> None:
    flat = latencies({"h0": [10, 10], "n0": [6, 6, 6]})
    scores = {"h0": torch.rand(2), "n0": torch.rand(3)}
    assert {n: len(u) for n, u in two_kinds_in_time(scores, flat, Budget("latency", 0.0, 0)).items()} == {
        "h0": 2,
        "n0": 3,
    }
    with pytest.raises(InputError, match="prune.ratio=0.5"):
        two_kinds_in_time(scores, flat, Budget("latency", 0.5, min_keep=0))
    with pytest.raises(InputError, match="round_to=1"):
        two_kinds_in_time(scores, flat, Budget("latency", 0.0, 0, round_to=2))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 0.9, 0.97])
def test_the_mac_search_keeps_the_best_sum_and_the_budget(ratio: float) -> None:
    model, samples = ADAPTERS["toy_tokens"]()
    costs = cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})
    generator = torch.Generator().manual_seed(1)
    scores = {name: torch.rand(count, generator=generator) for name, count in costs.counts.items()}
    budget = Budget("macs", ratio, min_keep=0)
    limit = budget.limit(costs.total("macs"))
    try:
        found = two_kinds(scores, costs, budget)
    except InputError:
        assert costs.total("macs", dict.fromkeys(costs.counts, 0)) > limit
        return
    heads, neurons = (
        sorted(
            ((float(s), n, i) for n in scores if costs.kinds[n] == kind for i, s in enumerate(scores[n])), reverse=True
        )
        for kind in ("head", "neuron")
    )
    best = -1.0
    for h, m in product(range(len(heads) + 1), range(len(neurons) + 1)):  # no heads at all among them
        taken = [*heads[:h], *neurons[:m]]
        kept = {name: sum(n == name for _, n, _ in taken) for name in costs.counts}
        if costs.total("macs", kept) <= limit:
            best = max(best, sum(score for score, _, _ in taken))
    assert costs.total("macs", {n: len(units) for n, units in found.items()}) <= limit
    assert sum(float(scores[n][units].sum()) for n, units in found.items()) == pytest.approx(best, rel=1e-5)


def test_gates_are_tuned_to_the_model_halfway(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data, costs, store = bundle_of(samples), cost_model(model, bundle_of(samples).example), Store(tmp_path)
    method = Kwon(ratio=0.36)
    plan = method.plan(model, ranked(method, model, data, store).scores, costs)
    halfway = replace(method, ratio=0.2, repair=()).plan(model, ranked(method, model, data, store).scores, costs)
    assert {n: torch.tensor(k).tolist() for n, k in plan.details[TEACHER].items()} == {
        g.name: list(g.kept) for g in halfway.groups
    }
    done = applied(method, model, plan, data, store)
    assert TEACHER not in done.plan.details and len(done.plan.details["repair"]["gates"]) == 4
    assert done.plan.details["repair"]["gates"][0] == {
        "consumer": "blocks.0.attn.proj",
        "units": len(done.plan.groups[0].kept),
        "skipped": True,
    }
    dense = applied(method, model, replace(plan, details={}), data, store)
    states = [d.model.network.state_dict() for d in (done, dense)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0]), "another teacher, other gates"


@pytest.mark.parametrize(
    ("steps", "halfway"),
    [(["gates"], True), (["bias", "gates"], True), (["gates", "refit"], True), (["refit", "gates"], False)],
)
def test_behind_a_refit_gates_are_tuned_to_the_dense_model(steps: list[str], halfway: bool, tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data, costs = bundle_of(samples), cost_model(model, bundle_of(samples).example)
    method = Kwon(ratio=0.36, repair=steps)  # type: ignore[arg-type]
    plan = method.plan(model, ranked(method, model, data, Store(tmp_path)).scores, costs)
    assert (TEACHER in plan.details) == halfway


@pytest.mark.parametrize("steps", [{}, {"rearrange": False}, {"repair": ()}, {"rearrange": False, "repair": ()}])
def test_each_step_can_be_left_out(steps: dict, tmp_path: Path) -> None:
    model, samples = ADAPTERS["bert"]()
    data, costs, store = bundle_of(samples), cost_model(model, bundle_of(samples).example), Store(tmp_path)
    method = Kwon(ratio=0.4, **steps)
    plan = method.plan(model, ranked(method, model, data, store).scores, costs)
    done = applied(method, model, plan, data, store)
    assert ("rearranged" in done.plan.details) == method.rearrange
    assert ("repair" in done.plan.details) == bool(method.repair)
    plain = cut(model, done.plan).network.state_dict()
    same = all(torch.equal(plain[n], t) for n, t in done.model.network.state_dict().items())
    assert same == (not method.repair)
    assert all(
        type(m) in {type(x) for x in model.network.modules()}
        for m in done.model.network.modules()
        if "NoHeads" not in type(m).__name__
    )


@pytest.mark.parametrize("name", ["toy_images", "grouped_query", "conv", "bert", "llama", "resnet_bottleneck"])
def test_activation_is_the_sum_of_weights_times_inputs(name: str) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    found = Activation().rank(model, data).only()
    for group in model.unit_groups():
        module = model.network.get_submodule(group.consumer.module)
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            for batch in data.calibration:
                model.logits(model.place(batch))
        handle.remove()
        squares, rows = 0.0, 0
        for x, batch in zip(seen, data.calibration, strict=True) if len(seen) == len(data.calibration) else ():
            x = x.movedim(group.consumer.channel_axis, -1)
            mask = batch.get("attention_mask")
            x = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
            squares, rows = squares + x.square().sum(0), rows + len(x)
        if not rows:
            continue
        norms = (squares / rows) ** 0.5  # type: ignore[operator]
        weight: Tensor = module.weight.detach().movedim(group.consumer.weight_dim, 0).flatten(1)  # type: ignore[assignment,operator,union-attr]
        for unit in range(group.count):
            wanted = sum(float(weight[i].abs().sum() * norms[i]) for i in group.consumer.index[unit])
            assert float(found[group.name][unit]) == pytest.approx(wanted, rel=1e-3)


def test_runs_rounds_and_steps_take_repairs(small_config: Compose, tmp_path: Path) -> None:
    few = ("evals=[macs]", "prune.ratio=0.2")
    rounds = ("prune=activation", "prune.repair=[bias,refit]", "prune.steps=2")
    record = run(small_config(*rounds, *few), tmp_path / "b")
    assert record.plan is not None and list(record.plan.details["repair"]) == ["bias", "refit"]
    again = run(small_config(*rounds, *few), tmp_path / "c")
    assert again.cache is not None and again.cache["hit"] and again.fingerprints == record.fingerprints
    parts = ("prune=fisher_evit", "prune.steps.units.repair=[refit]", "prune.steps.units.rearrange=true")
    record = run(small_config(*parts, *few), tmp_path / "d")
    assert record.plan is not None and record.plan.details["repair"]["refit"] and record.plan.tokens is not None


def test_repairs_make_up_for_merged_tokens(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data = bundle_of(samples)
    from prune.rankers.optin_tau import OptinTau

    method = OptinTau(ratio=0.2, static_share=0.5, repair=("refit",))
    store = Store(tmp_path)
    plan = method.plan(model, ranked(method, model, data, store).scores, cost_model(model, data.example))
    done = applied(method, model, plan, data, store)
    assert done.model.reduction is not None and done.plan.details["repair"]["refit"]
    again = applied(Fisher(repair=("refit",)), done.model, Plan.of(done.model, {}), data, store)
    assert again.model.reduction == done.model.reduction and again.plan.details["repair"]["refit"]


def test_any_ranker_takes_either_search(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, costs = bundle_of(samples), cost_model(model, bundle_of(samples).example)
    for method in (Fisher, Activation, Random, Optin):
        plans = []
        for search in ("greedy", "optin"):
            chosen = method(ratio=0.4, search=search)
            plans.append(chosen.plan(model, ranked(chosen, model, data, Store(tmp_path)).scores, costs))
        assert all(0.4 <= plan.ratio_reached < 0.5 for plan in plans)
        scores = chosen.combine(model, ranked(chosen, model, data, Store(tmp_path)).scores)
        found = two_kinds(scores, costs, Budget("macs", 0.4))
        assert {g.name: list(g.kept) for g in plans[1].groups} == {n: units.tolist() for n, units in found.items()}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="masked_rows=false"):
        GlobalRows(repair=("refit",))
    with pytest.raises(InputError, match="batch_size"):
        Kwon(batch_size=0)
    with pytest.raises(InputError, match="search"):
        Kwon(search="best")  # type: ignore[arg-type]
