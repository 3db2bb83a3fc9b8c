"""A whole run: what it leaves behind, what it reuses, and how it fails."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from evals.report import PHASES, Record
from main import run
from models.checkpoint import save_model
from models.toy_encoder import toy_encoder
from prune.base import Plan
from tests.conftest import Compose
from utils.errors import InputError, RunError

METRICS = {
    "accuracy": "fraction", "loss": "nat", "macs": "MAC/sample", "fvcore_flops": "fvcore FLOP/sample",
    "params": "count", "nonzero_params": "count", "size": "byte", "latency": "ms", "throughput": "samples/s",
    "throughput_end_to_end": "samples/s", "peak_memory": "byte",
}  # fmt: skip
STABLE = ("accuracy", "loss", "macs", "params", "nonzero_params", "size")
UNTIMED = f"evals=[{','.join(STABLE)}]"


def values(found: dict, side: str) -> dict[str, float]:
    return {name: found[side][name]["value"] for name in STABLE}


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_a_run_leaves_everything_behind(small_config: Compose, tmp_path: Path) -> None:
    record = run(small_config("prune.ratio=0.2"), tmp_path, command="python main.py prune.ratio=0.2")
    found = result(tmp_path)
    assert isinstance(record, Record) and found["status"] == "ok" and found["error"] is None
    for side in ("dense", "pruned"):
        assert {name: m["unit"] for name, m in found[side].items()} == METRICS
        assert all(m["value"] is not None for m in found[side].values())
    assert set(found["seconds"]) == set(PHASES) and found["seconds"]["total"] > 0
    assert found["config"]["prune"]["ratio"] == 0.2 and found["seed"] == 0
    assert set(found["fingerprints"]) == {"model", "data", "scores"} and all(found["fingerprints"].values())
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert Path(found["cache"]["path"]).is_file()

    plan = found["plan"]
    assert plan["ratio_asked"] == 0.2 and plan["tokens"] is None
    assert plan["ratio_reached"] == pytest.approx(
        1 - found["pruned"]["macs"]["value"] / found["dense"]["macs"]["value"]
    )
    assert 0.2 <= plan["ratio_reached"] < 0.22
    saved = Plan.load(tmp_path / "plan.json")
    assert [len(g.kept) for g in saved.groups] == [g["kept"] for g in plan["groups"]]

    assert OmegaConf.load(tmp_path / "config.yaml").data.seed == 0, "references are resolved"
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "kept_units.png", "scores_fisher.png", "training_curve.png",
    ]  # fmt: skip
    report = (tmp_path / "report.md").read_text()
    for part in ("python main.py prune.ratio=0.2", "| accuracy |", "plots/kept_units.png", "blocks.1.neurons"):
        assert part in report


def test_the_second_run_hits_the_cache_and_finds_the_same(small_config: Compose, tmp_path: Path) -> None:
    cfg = small_config("prune=taylor", UNTIMED, f"storage={tmp_path / 'fresh'}")
    first, second = (run(cfg, tmp_path / str(i)) for i in range(2))
    assert (first.cache["hit"], second.cache["hit"]) == (False, True)
    assert first.fingerprints == second.fingerprints and first.history == second.history
    assert values(first.to_json(), "pruned") == values(second.to_json(), "pruned")
    assert first.plan == second.plan


def test_two_fresh_runs_are_equal_bit_for_bit(small_config: Compose, tmp_path: Path) -> None:
    records = [run(small_config(UNTIMED, f"storage={tmp_path / str(i)}"), tmp_path / f"out{i}") for i in range(2)]
    torch.rand(3)
    assert records[0].fingerprints == records[1].fingerprints
    assert records[0].plan == records[1].plan
    paths = [Path(record.cache["path"]) for record in records]
    first, second = (load_file(path) for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_ratio_or_search_setting_hits_the_cache(small_config: Compose, tmp_path: Path) -> None:
    run(small_config("evals=[params]"), tmp_path / "0")
    for number, change in enumerate(
        ("prune.ratio=0.2", "prune.budget=params", "prune.normalize=rank", "prune.round_to=4")
    ):
        assert run(small_config("evals=[params]", change), tmp_path / str(number)).cache["hit"], change


def test_what_scores_depend_on_misses_the_cache(small_config: Compose, tmp_path: Path) -> None:
    run(small_config("evals=[params]"), tmp_path / "0")
    changes = (
        "data.calibration_batches=3",
        "data.calibration_batch_size=32",
        "seed=1",
        "dtype=bfloat16",
        "model.width=20",
    )
    for number, change in enumerate(changes):
        assert not run(small_config("evals=[params]", change), tmp_path / str(number)).cache["hit"], change


def test_changing_the_calibration_does_not_train_again(small_config: Compose, tmp_path: Path) -> None:
    first = run(small_config("evals=[params]"), tmp_path / "0")
    second = run(small_config("evals=[params]", "data.calibration_batches=4"), tmp_path / "1")
    assert first.fingerprints["model"] == second.fingerprints["model"]


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "fisher", "taylor prune.variant=abs"])
@pytest.mark.parametrize("budget", ["macs", "params", "width"])
def test_every_method_meets_every_budget(small_config: Compose, tmp_path: Path, method: str, budget: str) -> None:
    cfg = small_config(*f"prune={method}".split(), f"prune.budget={budget}", "evals=[macs,params]")
    found = run(cfg, tmp_path).to_json()
    assert found["plan"]["ratio_reached"] >= 0.4
    if budget != "width":
        assert found["pruned"][budget]["value"] <= 0.6 * found["dense"][budget]["value"]


def test_saved_models_evaluate_to_the_same_numbers(small_config: Compose, tmp_path: Path) -> None:
    first = run(small_config("save=true", UNTIMED), tmp_path / "cut").to_json()
    cfg = small_config("prune=none", UNTIMED, f"model.checkpoint={tmp_path / 'cut' / 'model'}")
    again = run(cfg, tmp_path / "again").to_json()
    assert values(again, "dense") == values(again, "pruned") == values(first, "pruned")
    assert again["plan"]["budget"] is None and again["cache"] == {"hit": False, "path": None}
    further = small_config("prune.ratio=0.1", UNTIMED, f"model.checkpoint={tmp_path / 'cut' / 'model'}")
    pruned_again = run(further, tmp_path / "more").to_json()
    assert pruned_again["pruned"]["macs"]["value"] <= 0.9 * first["pruned"]["macs"]["value"]


def test_bfloat16_runs(small_config: Compose, tmp_path: Path) -> None:
    full, half = (run(small_config(f"dtype={d}"), tmp_path / d).to_json() for d in ("float32", "bfloat16"))
    assert half["dense"]["size"]["value"] < 0.6 * full["dense"]["size"]["value"]
    assert half["dense"]["accuracy"]["value"] == pytest.approx(full["dense"]["accuracy"]["value"], abs=0.03)


def test_token_vectors_run(small_config: Compose, tmp_path: Path) -> None:
    found = run(
        small_config("data=random_tokens", "data.train_samples=128", "data.calibration_batch_size=32"), tmp_path
    )
    assert found.dense["accuracy"].details["chance"] == 0.1


def test_no_metric_at_all(small_config: Compose, tmp_path: Path) -> None:
    found = run(small_config("evals=[]"), tmp_path).to_json()
    assert found["status"] == "ok" and found["dense"] == found["pruned"] == {}
    assert any("No metric was selected" in warning for warning in found["warnings"])


def test_ratio_zero_keeps_everything(small_config: Compose, tmp_path: Path) -> None:
    found = run(small_config("prune.ratio=0", "evals=[accuracy,macs]"), tmp_path).to_json()
    assert found["dense"]["macs"] == found["pruned"]["macs"] and found["plan"]["ratio_reached"] == 0
    assert any("keeps everything" in warning for warning in found["warnings"])


def fails(cfg, out: Path, error: type[Exception], message: str) -> dict:
    with pytest.raises(error, match=message):
        run(cfg, out)
    found = result(out)
    assert found["status"] == "failed" and message.split(".*")[0].replace("\\", "") in found["error"]
    return found


def test_an_unreachable_budget_stops_before_any_work(small_config: Compose, tmp_path: Path) -> None:
    cfg = small_config("prune.ratio=0.99", f"storage={tmp_path / 's'}")
    found = fails(cfg, tmp_path / "out", InputError, "prune.ratio=0.99")
    assert "reachable minimum is" in found["error"]
    assert not (tmp_path / "s").exists(), "nothing may have been trained or ranked"


def test_an_empty_calibration_set_is_refused(small_config: Compose, tmp_path: Path) -> None:
    fails(small_config("data.calibration_batches=0"), tmp_path, InputError, "data.calibration_batches=0")
    fails(small_config("data.calibration_batches=99"), tmp_path, InputError, "data.calibration_batches=99")


def test_a_model_of_other_classes_is_refused(small_config: Compose, tmp_path: Path) -> None:
    fails(small_config("model.classes=5"), tmp_path, InputError, "model=toy_encoder does not fit data=digits")
    fails(small_config("model.image_size=16"), tmp_path, InputError, "model=toy_encoder cannot run on data=digits")


@pytest.mark.parametrize("node", ["prune", "recover", "evals.accuracy"])
def test_a_target_of_another_kind_is_refused_before_any_work(small_config: Compose, tmp_path: Path, node: str) -> None:
    cfg = small_config(f"storage={tmp_path / 's'}")
    OmegaConf.update(cfg, node, {"_target_": "collections.Counter"}, merge=False, force_add=True)
    fails(cfg, tmp_path / "out", InputError, "collections.Counter: gives a Counter without")
    assert not (tmp_path / "s").exists()


def test_nan_weights_are_named(small_config: Compose, tmp_path: Path) -> None:
    model = toy_encoder(classes=10, image_size=8)
    model.network.get_parameter("blocks.1.fc1.weight").data[0, 0] = float("nan")
    folder = save_model(model, tmp_path / "bad")
    cfg = small_config(f"model.checkpoint={folder}")
    fails(cfg, tmp_path / "out", InputError, "weight 'blocks.1.fc1.weight' has 1 NaN or infinite")


def test_nan_scores_are_named(small_config: Compose, tmp_path: Path) -> None:
    """Weights that are finite, but so large that the loss is not."""
    model = toy_encoder(classes=10, image_size=8)
    model.network.get_parameter("head.weight").data.mul_(1e38)
    folder = save_model(model, tmp_path / "bad")
    cfg = small_config(f"model.checkpoint={folder}")
    fails(cfg, tmp_path / "out", RunError, r"scores of blocks.0.heads \(fisher\)")


def test_a_corrupt_checkpoint_is_refused_and_left_alone(small_config: Compose, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"this is no safetensors file")
    fails(small_config(f"model.checkpoint={path}"), tmp_path / "out", InputError, "weights.safetensors is damaged")
    assert path.read_bytes() == b"this is no safetensors file"


def test_a_damaged_ranking_is_reported_and_computed_again(small_config: Compose, tmp_path: Path, caplog) -> None:
    cfg = small_config(f"storage={tmp_path / 's'}", "evals=[accuracy]")
    first = run(cfg, tmp_path / "0")
    path = Path(first.cache["path"])
    path.write_bytes(path.read_bytes()[:-4])
    second = run(cfg, tmp_path / "1")
    assert not second.cache["hit"] and "is damaged" in caplog.text and second.plan == first.plan
    assert run(cfg, tmp_path / "2").cache["hit"]


def test_a_failing_metric_keeps_what_was_measured_before(small_config: Compose, tmp_path: Path, monkeypatch) -> None:
    from evals.size import Size

    def broken(self, subjects):
        raise MemoryError("out of memory")

    monkeypatch.setattr(Size, "measure", broken)
    with pytest.raises(MemoryError):
        run(small_config("evals=[accuracy,size,params]"), tmp_path)
    found = result(tmp_path)
    assert found["status"] == "failed" and found["error"] == "MemoryError: out of memory"
    assert found["pruned"].keys() == {"accuracy"} and (tmp_path / "plan.json").is_file()
    assert "The run failed" in (tmp_path / "report.md").read_text()


def test_a_record_is_written_even_with_values_that_json_does_not_know(small_config: Compose, tmp_path: Path) -> None:
    record = Record.begin(small_config("evals=[]"), {}, "python main.py")
    with record.kept_in(tmp_path):
        record.history = [{"epoch": 1.0, "validation_loss": float("inf")}]
    assert result(tmp_path)["history"] == [{"epoch": 1.0, "validation_loss": None}]


def test_a_checkpoint_in_half_precision_loads(small_config: Compose, tmp_path: Path) -> None:
    model = toy_encoder(classes=10, image_size=8)
    save_file({n: t.bfloat16() for n, t in model.network.state_dict().items()}, tmp_path / "half.safetensors")
    cfg = small_config("model.width=48", "model.depth=4", "model.heads=4", "model.neurons=192", "prune=none",
                       f"model.checkpoint={tmp_path / 'half.safetensors'}", "evals=[loss]")  # fmt: skip
    assert run(cfg, tmp_path / "out").to_json()["status"] == "ok"
