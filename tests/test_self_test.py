"""The shipped experiment that measures a model against itself."""

import json
from pathlib import Path

import pytest

from main import run
from tests.conftest import SMALL, Compose
from utils.errors import RunError

QUICK = ("evals.self_test.attempts=1", *(f"evals.self_test.timed.{name}.{key}" for name in ("latency", "throughput")
         for key in ("seconds=0.05", "blocks=3", "precision=null")))  # fmt: skip
TOY = tuple(setting for setting in SMALL if not setting.startswith("evals."))


def test_the_experiment_runs_and_says_equal(composed: Compose, shared_storage: Path, tmp_path: Path) -> None:
    chosen = ("+experiment=self_test", *TOY, *QUICK, f"storage={shared_storage}")
    record = run(composed(*chosen, "evals.self_test.tolerance=0.9"), tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert record.status == "ok" and found["dense"]["macs"]["value"] == found["pruned"]["macs"]["value"]
    assert found["dense"]["size"]["value"] == found["pruned"]["size"]["value"]
    assert found["pruned"]["self_test"]["value"] < 0.9 and found["pruned"]["latency"]["speedup_interval"]


def test_it_fails_with_a_clear_message(composed: Compose, shared_storage: Path, tmp_path: Path) -> None:
    chosen = ("+experiment=self_test", *TOY, *QUICK, f"storage={shared_storage}")
    with pytest.raises(RunError, match="two copies of one model came out different: .*must be 1.00 within"):
        run(composed(*chosen, "evals.self_test.tolerance=1e-12"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_as_shipped_it_is_one_within_two_percent(composed: Compose, tmp_path: Path) -> None:
    record = run(composed("+experiment=self_test", f"storage={tmp_path / 'storage'}"), tmp_path / "out")
    assert all(abs(record.pruned[name].details["speedup"] - 1) <= 0.02 for name in ("latency", "throughput"))
