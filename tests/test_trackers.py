"""Trackers: what they are told, and what happens where their package is missing."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals.trackers.mlflow import MLflow
from evals.trackers.none import Nothing
from evals.trackers.tensorboard import TensorBoard
from evals.trackers.wandb import WandB
from evals.tracking import curves_of, figures_of, settings_of
from main import run
from tests.conftest import Compose
from tests.test_page import result
from tests.test_sweep import until
from utils.errors import InputError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "plots" / "kept_units.png")
    return tmp_path


def test_figures_settings_and_curves_are_plain() -> None:
    found = figures_of(result())
    assert found["pruned/accuracy"] == pytest.approx(0.86) and found["pruned/latency_speedup"] == 1.25
    assert "pruned/energy" not in found and found["ratio_reached"] == 0.4 and found["seconds/total"] == 1.0
    assert settings_of(result(config={"a": {"b": 1, "c": [1, 2]}, "d": None})) == {"a.b": 1, "a.c": "1, 2", "d": None}
    assert list(curves_of(result())) == [("train/train_loss", 1, 1.0), ("train/train_loss", 2, 0.5)]


@pytest.mark.parametrize(("tracker", "name"), [(TensorBoard, "tensorboard"), (MLflow, "mlflow"), (WandB, "wandb")])
def test_a_missing_package_is_one_line_with_the_command(tracker: Any, name: str, monkeypatch) -> None:
    monkeypatch.setattr("evals.tracking.find_spec", lambda package: None)
    with pytest.raises(InputError) as caught:
        tracker()
    assert f"pip install -r requirements-{name}.txt" in str(caught.value) and "\n" not in str(caught.value)
    requirements = Path(__file__).parent.parent / f"requirements-{name}.txt"
    assert requirements.read_text().startswith(f"{name}==")


class Calls:
    """Stands for a package: notes every call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple, dict]] = []
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, args, kwargs))
            return self

        return call

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def of(self, name: str) -> list[tuple]:
        return [args for called, args, _ in self.seen if called == name]


def test_mlflow_is_told_everything(out: Path, monkeypatch) -> None:
    monkeypatch.setattr("evals.tracking.find_spec", lambda package: True)
    fake = Calls()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    (out / "result.json").write_text("{}")
    MLflow(uri="sqlite:///x.db").log(result(), out)
    assert fake.of("set_tracking_uri") == [("sqlite:///x.db",)] and ("pruned/macs", 1200.0) in fake.of("log_metric")
    assert fake.of("log_params")[0][0]["evals.latency.batch"] == "1"
    assert [Path(args[0]).name for args in fake.of("log_artifact")] == ["result.json", "kept_units.png"]


def test_wandb_is_offline_and_told_everything(out: Path, monkeypatch) -> None:
    monkeypatch.setattr("evals.tracking.find_spec", lambda package: True)
    fake = Calls()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    WandB().log(result(status="failed"), out)
    ((_, _, options),) = [seen for seen in fake.seen if seen[0] == "init"]
    assert options["mode"] == "offline" and options["dir"] == str(out)
    assert fake.summary["pruned/macs"] == 1200.0 and fake.summary["status"] == "failed"
    assert [kwargs for name, _, kwargs in fake.seen if name == "finish"] == [{"exit_code": 1}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the packages' own
def test_mlflow_for_real_keeps_runs_in_a_local_file(out: Path, monkeypatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(out)  # where it puts artifacts
    (out / "result.json").write_text("{}")
    tracker = MLflow(uri=f"sqlite:///{out}/runs.db")
    for found in (result(), result(status="failed", error="RunError: no", dense={}, pruned={}, plan=None)):
        tracker.log(found, out)
    runs = mlflow.search_runs(experiment_names=["pare"], output_format="list")
    assert sorted(run.data.tags["status"] for run in runs) == ["failed", "ok"]
    (good,) = [run.data for run in runs if run.data.tags["status"] == "ok"]
    assert good.metrics["pruned/macs"] == 1200.0 and good.params["evals.latency.batch"] == "1"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the packages' own
def test_wandb_for_real_writes_offline_files(out: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    WandB().log(result(), out)
    (written,) = out.glob("wandb/offline-run-*/run-*.wandb")
    until(lambda: written.stat().st_size > 1000, seconds=30)  # a process of its own writes it


def test_tensorboard_leaves_events_that_can_be_read(out: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    events_of = import_module("tensorboard.backend.event_processing.event_accumulator")
    TensorBoard().log(result(), out)
    events = events_of.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "pruned/macs" in tags["scalars"] and "kept_units" in tags["images"]
    assert events.Scalars("pruned/macs")[0].value == 1200.0
    assert [point.step for point in events.Scalars("train/train_loss")] == [1, 2]


def test_a_run_tells_its_tracker_also_when_it_fails(small_config: Compose, tmp_path: Path, monkeypatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(Nothing, "log", lambda self, result, out: told.append(json.loads(json.dumps(result))))
    run(small_config("evals=[params]"), tmp_path / "ok")
    with pytest.raises(InputError):
        run(small_config("evals=[params]", "prune.ratio=0.999"), tmp_path / "failed")
    assert [found["status"] for found in told] == ["ok", "failed"]
    assert told[0]["config_hash"] and told[0]["environment"]["threads"] and (tmp_path / "ok" / "report.html").is_file()
