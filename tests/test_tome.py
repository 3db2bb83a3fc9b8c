"""Token merging as a method: schedules, budgets, what a run leaves, and saving."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from main import run
from models.checkpoint import how_to_load, load_network, load_weights, save_model
from models.cost import cost_model
from models.merging import Reduction
from models.token_cost import TokenCosts, token_costs
from models.vit import vit
from prune.base import Plan, Scores
from prune.budget import Budget
from prune.surgery import cut
from prune.tokens.schedule import even, from_ratio, linear, listed, reachable, shared, tilted
from prune.tokens.tome import Tome
from tests.adapters import ADAPTERS
from tests.conftest import Compose
from tests.test_contract import logits, random_plan
from tests.test_merging import MODELS, SCHEDULES, merging, toy, why_unfit
from tests.test_real_weights import DATA, DEIT, FEW
from utils.errors import InputError

SMALL_DEIT = {"embed_dim": 24, "num_heads": 4, "mlp_ratio": 1.0}


@pytest.fixture(scope="module")
def costs() -> TokenCosts:
    """Twelve narrow blocks on 197 tokens."""
    model = vit(name="deit_tiny_patch16_224", settings=SMALL_DEIT)
    return token_costs(model, {"inputs": torch.zeros(1, 3, 224, 224)})


def test_schedules_by_hand() -> None:
    assert linear(13, -1, 12) == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert linear(13, 1, 12) == (0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26)
    assert linear(13, 0, 12) == (13,) * 12 and linear(5, -1, 1) == (10,)
    assert linear(10, 0.9, 3) == (1, 10, 19), "0.9 is nine tenths, not the nearest double"
    assert listed([4, 2], 4) == (4, 2, 0, 0) and listed([], 2) == (0, 0)
    assert [even(n, 3) for n in range(5)] == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)]
    with pytest.raises(InputError, match=r"prune.r=\[1, 2, 3\]: has 3 entries, the model has 2 blocks"):
        listed([1, 2, 3], 2)


@pytest.mark.parametrize("inflection", [-1.0, -0.3, 0.7])
def test_a_tilted_schedule_gives_out_all_along_a_line(inflection: float) -> None:
    before = (0,) * 12
    for total in range(200):
        found = tilted(total, inflection, 12)
        assert sum(found) == total and min(found) >= 0
        sums = [sum(found[:n]) for n in range(13)]
        assert all(now >= then for now, then in zip(sums, [sum(before[:n]) for n in range(13)], strict=True))
        before = found
    wanted = [199 / 12 * (1 + inflection * (2 * block / 11 - 1)) for block in range(12)]
    assert all(abs(r - share) < 1 for r, share in zip(before, wanted, strict=True))
    assert tilted(7, 0.0, 4) == even(7, 4) and tilted(5, -1.0, 1) == tilted(5, 1.0, 1) == (5,)


@pytest.mark.parametrize("inflection", [-1.0, -0.5, 0.5])
def test_a_ratio_and_an_inflection_meet_the_budget_and_no_smaller_schedule_does(
    costs: TokenCosts, inflection: float
) -> None:
    total = costs.of(Reduction((0,) * 12))
    given_out = (partial(tilted, inflection=inflection, blocks=12), 5000)
    found, limit = from_ratio(costs, total, 0.4, 2, given_out), Budget("macs", 0.4).limit(total)
    schedules = (reachable(tilted(n, inflection, 12), 197, 1, 2) for n in range(5000))
    assert found == next(s for s in schedules if costs.of(Reduction(s)) <= limit)


def test_the_same_share_goes_from_every_block(costs: TokenCosts) -> None:
    before = [0] * 12
    for steps in range(0, 501, 4):
        found = shared(steps, 197, 1, 12)
        gone = [sum(found[: n + 1]) for n in range(12)]
        assert min(found) >= 0 and all(now >= then for now, then in zip(gone, before, strict=True))
        left = 196 * (1 - steps / 1000) ** 12
        assert abs(196 - gone[-1] - left) <= 1 + (steps == 500)
        before = gone
    total = costs.of(Reduction((0,) * 12))
    merged = Tome(ratio=0.5, shape="share").reduction(costs, total).merged
    assert merged[0] > merged[5] > merged[-1] and 0.5 <= 1 - costs.of(Reduction(merged)) / total < 0.51
    for ratio in (0.1, 0.6, 0.7, 0.75):
        far = Tome(ratio=ratio, shape="share").reduction(costs, total).merged
        assert ratio <= 1 - costs.of(Reduction(far)) / total < ratio + 0.015


def test_what_can_be_reached_by_hand() -> None:
    assert reachable((16,) * 12, 197, 1, 2)[-2:] == (16, 10)
    assert reachable((4, 4, 4), 12, 1, 6) == (4, 2, 0)
    assert reachable((9, 9), 2, 1, 1) == (0, 0) and reachable((9,), 3, 3, 1) == (0,)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2, 0.4123, 0.5, 0.6])
def test_a_ratio_takes_the_first_schedule_that_meets_it(costs: TokenCosts, ratio: float) -> None:
    total = costs.of(Reduction((0,) * 12))
    found, limit = from_ratio(costs, total, ratio, 2), Budget("macs", ratio).limit(total)
    schedules = (reachable(even(n, 12), 197, 1, 2) for n in range(12 * 98 + 1))
    first = next(s for s in schedules if costs.of(Reduction(s)) <= limit)
    assert found == first and costs.of(Reduction(found)) <= limit


def test_macs_fall_along_the_schedules(costs: TokenCosts) -> None:
    totals = [costs.of(Reduction(reachable(even(n, 12), 197, 1, 30))) for n in range(0, 12 * 98 + 1, 7)]
    assert totals == sorted(totals, reverse=True)


def test_a_ratio_out_of_reach_names_the_largest(costs: TokenCosts) -> None:
    total = costs.of(Reduction((0,) * 12))
    with pytest.raises(InputError, match=r"prune.min_tokens=100 leaves at least .* at most (0\.\d+)") as caught:
        from_ratio(costs, total, 0.9, 100)
    largest = float(str(caught.value).rpartition(" ")[2])
    assert min(n for row in _rows(costs, from_ratio(costs, total, largest, 100)) for n in row) >= 100
    with pytest.raises(InputError):
        from_ratio(costs, total, largest + 2e-4, 100)


def _rows(costs: TokenCosts, merged: tuple[int, ...]) -> list[tuple[int, int]]:
    return costs.counts(Reduction(merged))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 3, "ratio": 0.2}, "prune.r=3, prune.ratio=0.2: give one of the two"),
        ({"r": (1, 2), "inflection": 0.5}, "prune.inflection=0.5: must be 0 where prune.r is a list"),
        ({"r": 2, "shape": "share"}, "prune.shape=share: needs prune.ratio"),
        ({"ratio": 0.2, "importance": -1.0}, "importance"),
        ({"ratio": 0.2, "metric": "queries"}, "metric"),
        ({"r": 3, "inflection": 1.5}, r"inflection=1.5 must be in \[-1, 1\]"),
        ({"r": -1}, "r=-1 must be at least 0"),
        ({"r": (1, -1)}, "must be at least 0"),
        ({"ratio": 1.0}, r"must be in \[0, 1\)"),
        ({"min_tokens": 0}, "must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tome(**settings)


def planned(method: Tome) -> Plan:
    model, samples = toy()  # 17 tokens, 3 blocks
    costs = cost_model(model, {"inputs": samples["inputs"][:1]})
    method.check(costs)
    return method.plan(model, Scores({}), costs)


def test_a_plan_says_what_is_executed() -> None:
    plan = planned(Tome(r=(4, 99)))
    assert plan.tokens == Reduction((4, 6, 0)) and plan.token_counts == ((17, 13), (13, 7), (7, 7))
    assert plan.budget == "macs" and plan.ratio_asked == plan.ratio_reached > 0
    assert planned(Tome(r=4, proportional=False, min_tokens=10)).tokens == Reduction((4, 3, 0), proportional=False)
    assert planned(Tome()).ratio_asked == 0.4 <= planned(Tome()).ratio_reached
    assert planned(Tome(r=0)).is_identity and planned(Tome(ratio=0)).is_identity and not plan.is_identity
    assert plan.keeps_all_units


def test_a_plan_reports_the_macs_of_the_model_it_makes() -> None:
    model, samples = toy()
    example = {"inputs": samples["inputs"][:1]}
    costs = cost_model(model, example)
    plan = Tome(ratio=0.3).plan(model, Scores({}), costs)
    pruned = Tome().apply(model, plan)
    left = cost_model(pruned, example).total("macs")
    assert plan.ratio_reached == 1 - left / costs.total("macs")
    again = Tome(ratio=0.1).plan(pruned, Scores({}), cost_model(pruned, example))
    assert 1 - cost_model(cut(pruned, again), example).total("macs") / left == again.ratio_reached >= 0.1
    assert model.reduction is None


def test_a_schedule_for_the_tokens_in_front_alone_merges_none_in_the_last_block() -> None:
    found = planned(Tome(r=(4, 5), front_only=True))
    assert found.tokens == Reduction((4, 5, 0), front_only=True) and found.token_counts == ((17, 13), (13, 8), (8, 1))
    assert planned(Tome(r=4, front_only=True)).tokens == Reduction((4, 4, 0), front_only=True)
    assert planned(Tome(r=4, inflection=-1.0, front_only=True)).tokens == Reduction((8, 0, 0), front_only=True)
    whole = planned(Tome(r=(4, 5)))
    assert found.ratio_reached > whole.ratio_reached
    free = planned(Tome(ratio=0.0, front_only=True))
    assert free.tokens == Reduction((0, 0, 0), front_only=True) and free.ratio_reached > 0 and not free.is_identity
    with pytest.raises(InputError, match=r"merged=\[4, 5, 1\]: with front_only the last block must merge 0"):
        Reduction((4, 5, 1), front_only=True)
    with pytest.raises(InputError, match="has 3 entries, the model has 2 blocks"):
        planned(Tome(r=(4, 5, 1), front_only=True))


@pytest.mark.parametrize("settings", [{}, {"inflection": -0.5}, {"shape": "share"}])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_tokens_that_the_last_block_spares_are_kept_elsewhere(costs: TokenCosts, settings: dict, ratio: float) -> None:
    total = costs.of(Reduction((0,) * 12))
    whole, front = (Tome(ratio=ratio, front_only=f, **settings).reduction(costs, total) for f in (False, True))
    assert front.front_only and front.merged[-1] == 0 and len(front.merged) == 12
    assert ratio <= 1 - costs.of(front) / total < ratio + 0.02
    assert sum(front.merged[:-1]) < sum(whole.merged[:-1])


def test_a_head_that_reads_all_tokens_needs_them_all() -> None:
    model, samples = MODELS["averaged"]()
    costs = cost_model(model, {"inputs": samples["inputs"][:1]})
    with pytest.raises(InputError, match="prune.front_only=true: must be false for a model whose head reads more"):
        Tome(ratio=0.2, front_only=True).check(costs)


def test_a_plan_with_all_its_settings_survives_a_file(tmp_path: Path) -> None:
    plan = planned(Tome(ratio=0.5, metric="tokens", importance=0.1, growth=0.2, front_only=True))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_model_without_tokens_is_refused_before_any_work() -> None:
    model, samples = ADAPTERS["bert"]()
    with pytest.raises(InputError, match="prune=tome: tokens of this model can't be merged: it has no tokens"):
        Tome().check(cost_model(model, {name: t[:1] for name, t in samples.items()}))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    model, _ = toy()
    for plan in (planned(Tome(r=3)), planned(Tome(r=0)), Plan.of(model, {})):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
    rows = planned(Tome(r=3)).summary()["tokens"]
    assert rows[1] == {"layer": 1, "merged": 3, "attention": 14, "mlp": 11}
    with pytest.raises(ValueError, match="must have one a block"):
        Plan.of(model, {}, tokens=Reduction((1, 1, 1)))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gated"])  # no builder makes that one
def test_a_saved_model_merges_again(name: str, tmp_path: Path) -> None:
    model, samples = MODELS[name]()
    for number, schedule in enumerate(SCHEDULES.values()):
        if why_unfit(model, schedule):
            continue
        small = merging(cut(model, random_plan(model, number)), schedule)
        folder = save_model(small, tmp_path / f"model{number}")
        reloaded = load_weights(MODELS[name]()[0], str(folder))
        assert torch.equal(logits(reloaded, samples), logits(small, samples)) and reloaded.reduction == schedule


def test_a_saved_model_is_a_plain_module_and_no_stock_one(tmp_path: Path) -> None:
    model, samples = MODELS["averaged"]()
    small = merging(model, Reduction((2, 2, 2)))
    folder = save_model(small, tmp_path / "model")
    assert "timm cannot express merged tokens" in how_to_load(folder) and not (folder / "config.json").exists()
    with torch.inference_mode():
        assert torch.equal(load_network(folder)(samples["inputs"]), logits(small, samples))
    stock = save_model(merging(model, Reduction((0, 0, 0))), tmp_path / "stock")
    assert "the family's own library" in how_to_load(stock)


@pytest.mark.parametrize(
    "damage",
    [
        5,
        [1, 2, 3],
        {"merged": [1, 2, 3]},
        {"merged": [1, 2], "before": "mlp", "proportional": True},
        {"merged": [1, 2, -3], "before": "mlp", "proportional": True},
        {"merged": [1.0, 2, 3], "before": "mlp", "proportional": True},
        {"merged": [1, 2, 3], "before": "attention", "proportional": True},
        {"merged": [1, 2, 3], "before": [], "proportional": True},
        {"merged": [1, 2, 3], "before": "mlp", "proportional": None},
    ],
)
def test_a_damaged_manifest_is_refused(damage: object, tmp_path: Path) -> None:
    model, _ = toy()
    folder = save_model(merging(model, Reduction((1, 1, 1))), tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {name: manifest["tokens"][name] for name in ("merged", "before", "proportional")}
    assert found == {"merged": [1, 1, 1], "before": "mlp", "proportional": True}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokens": damage}))
    with pytest.raises(InputError, match=r"model.checkpoint=.*: tokens of manifest.json are damaged: "):
        load_weights(toy()[0], str(folder))


def test_a_run_merges_and_says_so(small_config: Compose, tmp_path: Path) -> None:
    record = run(small_config("prune=tome", "prune.r=5", "save=true", "evals=[accuracy,macs]"), tmp_path / "first")
    assert record.status == "ok" and record.plan and record.plan.token_counts == ((17, 12), (12, 7))
    found = json.loads((tmp_path / "first" / "result.json").read_text())
    assert [row["mlp"] for row in found["plan"]["tokens"]] == [12, 7]
    ratio = 1 - found["pruned"]["macs"]["value"] / found["dense"]["macs"]["value"]
    assert ratio == found["plan"]["ratio_reached"] == found["plan"]["ratio_asked"] > 0.2
    report = (tmp_path / "first" / "report.md").read_text()
    assert "| 0 | 17 | 12 |\n| 1 | 12 | 7 |" in report and "(plots/tokens.png)" in report
    assert "What was kept" not in report and "kept_units" not in report, "every unit is there"
    assert (tmp_path / "first" / "plots" / "tokens.png").is_file()
    again = run(
        small_config("prune=none", f"model.checkpoint={tmp_path}/first/model", "evals=[accuracy,macs]"),
        tmp_path / "next",
    )
    for name in ("accuracy", "macs"):
        assert again.dense[name].value == record.pruned[name].value


def test_recovery_trains_a_model_that_merges(small_config: Compose, tmp_path: Path) -> None:
    settings = ("prune=tome", "prune.ratio=0.3", "recover=finetune", "recover.epochs=2", "evals=[loss]")
    record = run(small_config(*settings), tmp_path)
    before, *_, after = record.recovery.history  # type: ignore[union-attr]
    assert after["validation_loss"] < before["validation_loss"]
    assert record.recovery and record.recovery.model.reduction == record.plan.tokens  # type: ignore[union-attr]


def test_ratios_can_be_swept_with_other_methods(small_config: Compose, tmp_path: Path) -> None:
    reached = []
    for ratio in (0.1, 0.3):
        record = run(small_config("prune=tome", f"prune.ratio={ratio}", "evals=[macs]"), tmp_path / str(ratio))
        assert record.plan and record.plan.ratio_asked == ratio <= record.plan.ratio_reached
        reached.append(record.plan.ratio_reached)
    assert reached[0] < reached[1]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (PARE_DATA)")
def test_merging_costs_a_trained_deit_little(composed: Compose, shared_storage: Path, tmp_path: Path) -> None:
    record = run(composed(f"storage={shared_storage}", *FEW, *DEIT, "prune=tome", "prune.r=13"), tmp_path)
    assert record.pruned["accuracy"].details["samples"] == 900
    assert float(record.pruned["accuracy"].value or 0) >= 0.79
    assert record.plan and record.plan.ratio_reached == pytest.approx(1 - 0.583, abs=1e-3)
