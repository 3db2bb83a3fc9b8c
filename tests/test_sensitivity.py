"""Sensitivity: a known useless layer, prefix reuse, allocation against brute force, resuming."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch

from data.base import DataBundle
from evals.report import Record
from main import run
from models.base import PrunableModel
from models.cost import cost_model
from prune.budget import Budget
from prune.gates import gated
from prune.rankers.fisher import Fisher
from prune.recovery.none import NoRecovery
from prune.rounds import in_rounds
from prune.search import select_units
from prune.sensitivity.allocation import allotted, read_allocation, removed_counts
from prune.sensitivity.checks import chance_level, curves_of, validated
from prune.sensitivity.curves import Curve, best_shares, marginals
from prune.sensitivity.method import Sensitivity
from prune.sensitivity.passes import SuffixPasses
from prune.weights.matrices import prunable_matrices
from prune.weights.wanda import Wanda
from prune.whole.weights import GlobalWeights
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.test_whole import Silent
from utils.errors import InputError
from utils.storage import Scratch, Store


def toy(name: str = "deit") -> tuple[PrunableModel, DataBundle]:
    model, samples = ADAPTERS[name]()
    return model, bundle_of(samples)


def with_useless_mlp(layer: int) -> tuple[PrunableModel, DataBundle]:
    """A model in which nothing of one MLP reaches the output."""
    model, data = toy()
    with torch.no_grad():
        model.network.get_submodule(f"blocks.{layer}.mlp.fc2").weight.zero_()  # type: ignore[union-attr,operator]
    return model, data


@pytest.mark.parametrize("layer", [0, 1])
def test_a_useless_layer_is_found_and_goes_first(layer: int) -> None:
    model, data = with_useless_mlp(layer)
    method = Sensitivity(ratio=0.03, kinds=("neuron",), score="random")
    scores, costs = method.rank(model, data), cost_model(model, data.example)
    curves = curves_of(scores.facts["rows"])
    useless, other = f"blocks.{layer}.neurons", f"blocks.{1 - layer}.neurons"
    assert max(map(abs, curves[useless].losses)) < 1e-6 and max(map(abs, curves[other].losses)) > 1e-3
    assert max(map(abs, curves[f"blocks.{layer}.mlp.fc1"].losses)) < 1e-6
    fixed = {**curves, other: Curve(curves[other].ratios, tuple(map(abs, curves[other].losses)))}
    kept = select_units(allotted(fixed, scores.terms["random"]), costs, method._budget)
    assert len(kept[other]) == costs.counts[other] and len(kept[useless]) < costs.counts[useless]


@pytest.mark.parametrize("name", ["deit", "bert", "llama", "resnet_basic"])
def test_rows_are_those_of_whole_passes(name: str) -> None:
    model, data = toy(name)
    found = Sensitivity(sweep=("units",), grid=(0.5,), ablate=False).rank(model, data)
    for row in found.facts["rows"]:
        (group,) = (g for g in model.unit_groups() if g.name == row["part"])
        gate = torch.ones(group.count)
        gate[
            found.terms["fisher"][group.name].argsort(descending=True, stable=True)[group.count - row["removed"] :]
        ] = 0
        losses = []
        for gates in ({}, {group.name: gate}):
            with torch.inference_mode(), gated(model, gates):
                sums = [
                    (float(data.task.loss(model.logits(b), b)), len(next(iter(b.values())))) for b in data.calibration
                ]
            losses.append(sum(loss * n for loss, n in sums) / sum(n for _, n in sums))
        assert row["loss_change"] == pytest.approx(losses[1] - losses[0], abs=2e-5) and row["divergence"] >= 0


def test_blocks_before_the_changed_one_never_run() -> None:
    model, data = toy()
    passes = SuffixPasses(model, data.calibration, data.task)
    passes.go_to(1)
    runs = []
    hooks = [
        model.network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        for name in ("blocks.0.attn", "blocks.1.attn")
    ]
    assert passes.measure() == passes.dense or passes.measure().loss == pytest.approx(passes.dense.loss, abs=1e-6)
    for hook in hooks:
        hook.remove()
    assert set(runs) == {"blocks.1.attn"}


def test_the_model_is_left_as_it_was_and_a_killed_sweep_goes_on(tmp_path: Path, monkeypatch) -> None:
    model, data = toy()
    before, method = model.fingerprint(), Sensitivity(grid=(0.3, 0.6), bins=2)
    through = method.rank_on(model, data, None)
    calls, measure = [], SuffixPasses.measure

    def dies(self):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(SuffixPasses, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        method.rank_on(model, data, Scratch(tmp_path / "s"))
    again = method.rank_on(model, data, Scratch(tmp_path / "s"))
    assert (
        again.facts == through.facts
        and len(calls) == 9 + 1 + len(through.facts["rows"] + through.facts["ablation"]) - 7
    )
    assert model.fingerprint() == before and not any(p.grad is not None for p in model.network.parameters())


def brute_force(curves: dict[str, Curve], sizes: dict[str, int], ratio: float) -> float:
    """The lowest sum of losses over a fine grid of shares that removes enough."""
    grid = [step / 20 for step in range(21)]
    hulls = {name: curve.hull() for name, curve in curves.items()}
    best = float("inf")
    for shares in itertools.product(grid, repeat=len(curves)):
        allowed = all(s <= curve.ratios[-1] for s, curve in zip(shares, curves.values(), strict=True))
        if (
            allowed
            and sum(s * n for s, n in zip(shares, sizes.values(), strict=True)) >= ratio * sum(sizes.values()) - 1e-9
        ):
            best = min(best, sum(hull.at(s) for s, hull in zip(shares, hulls.values(), strict=True)))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_optimal_and_meet_the_ratio(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    grid = (0.25, 0.5, 0.75)
    curves = {n: Curve(grid, tuple(torch.rand(3, generator=draw).sort().values.tolist())) for n in "abc"}
    sizes = {"a": 40, "b": 20, "c": 20}
    shares = best_shares(curves, sizes, 0.5)
    assert shares is not None
    assert sum(shares[n] * sizes[n] for n in sizes) == pytest.approx(0.5 * 80)
    total = sum(curves[n].hull().at(shares[n]) for n in sizes)
    assert total == pytest.approx(brute_force(curves, sizes, 0.5), abs=1e-6)
    assert best_shares(curves, sizes, 0.8) is None


def test_hull_and_marginals_by_hand() -> None:
    curve = Curve((0.25, 0.5, 0.75), (1.0, 0.5, 3.5))
    assert curve.hull() == Curve((0.5, 0.75), (0.5, 3.5)) and curve.at(0.375) == pytest.approx(0.75)
    assert marginals(curve, 4)[:3].tolist() == pytest.approx([0.25, 0.25, 3.0]) and float(marginals(curve, 4)[3]) > 10


def test_random_scores_do_not_beat_chance_and_true_ones_do() -> None:
    measured = torch.randn(40, generator=torch.Generator().manual_seed(3)).tolist()
    noise = torch.rand(40, generator=torch.Generator().manual_seed(4)).tolist()
    rows = [
        {"kind": "head", "loss_change": m, "predicted": {"right": 2 * m, "random": r, "flat": 1.0}}
        for m, r in zip(measured, noise, strict=True)
    ]
    found = {row["score"]: row for row in validated(rows)}
    assert found["right"]["spearman"] == pytest.approx(1) and found["right"]["beats_random"]
    assert not found["random"]["beats_random"] and found["flat"]["spearman"] is None
    assert 0.15 < (chance_level(measured) or 0) < 0.4


def allocation_file(model: PrunableModel, path: Path, slopes: dict[str, float]) -> Path:
    sizes = {m.name: m.size for m in prunable_matrices(model)}
    parts = {
        n: {"count": s, "ratio": [0.5, 0.9], "loss_change": [slopes.get(n, 1.0) * s * 0.5, slopes.get(n, 1.0) * s * 2]}
        for n, s in sizes.items()
    }
    path.write_text(json.dumps({"format": 1, "parts": parts}))
    return path


def test_weights_go_where_an_allocation_says(tmp_path: Path) -> None:
    model, data = toy()
    sizes = {m.name: m.size for m in prunable_matrices(model)}
    cheap = next(iter(sizes))
    path = allocation_file(model, tmp_path / "a.json", {cheap: 0.001})
    counts = removed_counts(path, sizes, 0.3)
    assert sum(counts.values()) == round(0.3 * sum(sizes.values())) and counts[cheap] == int(0.9 * sizes[cheap])
    for method in (
        GlobalWeights(ratio=0.3, allocation=str(path)),
        Wanda(ratio=0.3, group="tensor", allocation=str(path)),
    ):
        plan = method.plan(model, method.rank(model, data), cost_model(model, data.example))
        done = method.apply_on(model, plan, data, Store(tmp_path / method.name))
        zeros = {row.name: row.zeros for row in done.plan.matrices}
        assert zeros[cheap] == counts[cheap] and abs(sum(zeros.values()) - sum(counts.values())) <= len(zeros)
    with pytest.raises(InputError, match="reach to 0.9"):
        removed_counts(path, sizes, 0.95)
    with pytest.raises(InputError, match="has no curve for other"):
        removed_counts(path, {**sizes, "other": 3}, 0.5)
    (tmp_path / "bad.json").write_text('{"parts": {"x": {"count": 1, "ratio": [0.5, 0.2], "loss_change": [1, 2]}}}')
    with pytest.raises(InputError, match="must ascend"):
        read_allocation(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "method", [Fisher(ratio=0.3, allocation="sensitivity"), GlobalWeights(ratio=0.3, allocation="sensitivity")]
)
def test_an_allocation_is_made_on_the_way(method, tmp_path: Path) -> None:
    model, data = toy()
    costs = cost_model(model, data.example)
    done = in_rounds(method, NoRecovery(), model, data, Store(tmp_path), costs, 0, Silent())
    (path,) = tmp_path.rglob("*.allocation.json")
    curves = read_allocation(path)
    if isinstance(method, Fisher):
        scores = method.rank(model, data).only()
        expected = select_units(allotted(curves, scores), costs, Budget("macs", 0.3))
        assert {g.name: list(g.kept) for g in done.plan.groups} == {n: k.tolist() for n, k in expected.items()}
    else:
        sizes = {m.name: m.size for m in prunable_matrices(model)}
        assert {m.name: m.zeros for m in done.plan.matrices} == removed_counts(
            path, sizes, 0.3, dict.fromkeys(sizes, 1)
        )


def test_bad_settings() -> None:
    for settings, match in (
        ({"grid": (0.5, 0.2)}, "must ascend"),
        ({"sweep": ()}, "must name"),
        ({"allocation": "sensitivity"}, "must be null"),
    ):
        with pytest.raises(InputError, match=match):
            Sensitivity(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prune.search=optin: must be greedy beside prune.allocation=sensitivity"):
        Fisher(allocation="sensitivity", search="optin")


def test_a_run_leaves_table_pictures_and_allocation(small_config: Compose, tmp_path: Path) -> None:
    record: Record = run(
        small_config("+experiment=digits_sensitivity", "prune.grid=[0.3,0.6]", "evals=[accuracy]"), tmp_path
    )
    rows = list(csv.DictReader((tmp_path / "sensitivity.csv").read_text().splitlines()))
    assert {"head", "neuron", "weight"} == {row["kind"] for row in rows} and all(row["loss_change"] for row in rows)
    assert set(read_allocation(tmp_path / "allocation.json")) == {row["part"] for row in rows}
    report = (tmp_path / "report.md").read_text()
    assert (
        "Cross-effect" in report
        and "What scores predict" in report
        and "The validation split was not looked at" in report
    )
    assert all((tmp_path / "plots" / f"sensitivity_{name}.png").is_file() for name in ("map", "curves"))
    effect = record.to_json()["plan"]["details"]["sensitivity"]["cross_effect"]
    assert effect["gap"] == pytest.approx(effect["joint"] - effect["sum_of_layers"])
