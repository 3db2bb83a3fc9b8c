"""Sweeps: their files, their failures, and that a job equals the same run by itself."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.sweep import main, rebuild
from tests.conftest import SMALL, Command
from tests.faults import Fault, Runner
from tests.test_cli import ROOT

FAST = [s for s in SMALL if not s.startswith("evals.")]


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(
    forked: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str], Path]:
    """A sweep over two methods and three ratios, of which the largest can't be reached."""
    cwd = tmp_path_factory.mktemp("sweep")
    done = forked("-m", "prune=taylor,random", "prune.ratio=0.2,0.4,0.99", "evals=[accuracy,macs]", *FAST, cwd=cwd)
    (folder,) = cwd.glob("multirun/*/*")
    return folder, done, cwd


def test_a_sweep_leaves_table_report_and_plot(swept) -> None:
    folder, done, _ = swept
    rows = rows_of(folder)
    assert done.returncode == 1, "jobs failed"
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"] * 2
    assert all("prune.ratio=0.99" in row["error"] for row in rows if row["status"] == "failed")
    assert [row["prune.ratio"] for row in rows] == ["0.2", "0.4", "0.99"] * 2
    assert [row["cache_hit"] for row in rows if row["status"] == "ok"] == ["False", "True"] * 2, "ranked once a method"
    assert all(float(row["pruned_macs"]) < float(row["dense_macs"]) for row in rows if row["status"] == "ok")
    report = (folder / "report.md").read_text()
    assert "Job 2 failed" in report and "pareto.png" in report and "| taylor | 0.2 |" in report
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_can_be_rebuilt_at_any_time(swept) -> None:
    folder, *_ = swept
    before = (folder / "results.csv").read_text()
    for name in ("results.csv", "report.md", "pareto.png"):
        (folder / name).unlink()
    command = [sys.executable, "-m", "evals.report", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "6 jobs, 2 not ok" in done.stdout
    assert (folder / "results.csv").read_text() == before and (folder / "pareto.png").is_file()


def test_a_job_equals_the_same_run_by_itself(swept, forked: Command, tmp_path: Path) -> None:
    folder, _, cwd = swept
    swept_job = json.loads((folder / "4" / "result.json").read_text())
    arguments = ["prune=random", "prune.ratio=0.4", "evals=[accuracy,macs]", *FAST]
    assert forked(*arguments, cwd=tmp_path).returncode == 0
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    alone = json.loads(path.read_text())
    for key in ("dense", "pruned", "plan", "fingerprints", "history"):
        assert alone[key] == swept_job[key], key
    assert (path.parent / "plan.json").read_bytes() == (folder / "4" / "plan.json").read_bytes()


def test_a_failed_job_keeps_its_method_and_says_so_at_once(swept) -> None:
    folder, done, _ = swept
    assert [row["method"] for row in rows_of(folder)] == ["taylor_batch"] * 3 + ["random"] * 3
    assert "job 2 failed: prune.ratio=0.99" in done.stderr and "job 5 failed" in done.stderr


def test_several_dense_models_are_shown_row_by_row(tmp_path: Path) -> None:
    for number, accuracy in enumerate((0.9, 0.8)):
        unit = {"unit": "fraction"}
        sides = {"dense": {"accuracy": {"value": accuracy} | unit}, "pruned": {"accuracy": {"value": 0.7} | unit}}
        rest = {"status": "ok", "error": None, "method": "m", "plan": None, "cache": {"hit": False}}
        job(tmp_path, number, json.dumps(sides | rest | {"seconds": {"total": 1.0}}))
    rebuild(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "dense_accuracy" in report and "Dense:" not in report and "| 0.8 | 0.7 |" in report


def test_perplexities_are_drawn_and_columns_without_a_figure_are_named(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("evals.plots.save_figure", lambda figure, path: drawn.append(figure))
    for number, (perplexity, macs) in enumerate(((6.0, 80), (30.0, 50))):
        sides = {
            side: {
                "energy": {"value": None, "unit": "J", "reason": "no meter"},
                "macs": {"value": cost, "unit": "MAC/sample"},
                "perplexity": {"value": value, "unit": "per token"},
            }
            for side, value, cost in (("dense", 5.0, 100), ("pruned", perplexity, macs))
        }
        rest = {"status": "ok", "error": None, "method": "m", "plan": None, "cache": {"hit": False}}
        job(tmp_path, number, json.dumps(sides | rest | {"seconds": {"total": 1.0}}))
    rebuild(tmp_path)
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "perplexity"
    assert sorted(map(tuple, axes.lines[0].get_xydata().tolist())) == [(50, 30.0), (80, 6.0)]
    report = (tmp_path / "report.md").read_text()
    assert "Without a figure in any job, for the reasons in their reports: energy." in report
    assert "pruned_energy" not in report and "pareto.png" in report


def job(folder: Path, number: int, text: str | None) -> None:
    (folder / str(number)).mkdir()
    if text is not None:
        (folder / str(number) / "result.json").write_text(text)


def test_missing_and_damaged_results_are_rows_too(tmp_path: Path, capsys) -> None:
    job(tmp_path, 0, None)
    job(tmp_path, 1, '{"half')
    job(tmp_path, 10, "[]")
    failed = {
        "status": "failed",
        "error": "out | of\nmemory",
        "method": "none",
        "plan": None,
        "dense": {},
        "pruned": {},
    }
    job(tmp_path, 9, json.dumps(failed | {"cache": {"hit": False}, "seconds": {"total": 1.5}}))
    (tmp_path / "notes").mkdir()
    rows = rebuild(tmp_path)
    assert [row["job"] for row in rows] == [0, 1, 9, 10]
    assert [row["status"] for row in rows] == ["unfinished", "unfinished", "failed", "unfinished"]
    assert "out \\| of memory" in (tmp_path / "report.md").read_text()
    assert main([str(tmp_path)]) == 0 and main([str(tmp_path / "nowhere")]) == 2 and main([]) == 2
    empty = tmp_path / "notes"
    assert main([str(empty)]) == 2 and not list(empty.iterdir())


def test_an_interrupted_sweep_keeps_its_table(runs: Runner, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    wanted = ["recover=finetune", "recover.epochs=1,2", "evals=[accuracy]", f"hydra.sweep.dir={sweep}"]
    ctrl_c = Fault("interrupt", 1, inside=f"{sweep}/1/.plan.json")
    (done,) = runs.run(tmp_path, ["-m", *FAST, *wanted], ctrl_c, whole=True)
    assert done.code == 130, done.err
    assert [row["status"] for row in rows_of(sweep)] == ["ok", "failed"]
    assert "interrupted" in rows_of(sweep)[1]["error"]


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.05)
