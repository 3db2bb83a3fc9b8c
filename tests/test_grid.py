"""Sweeps whose jobs fail, whose place is full, or whose starting process is gone: one message, and nothing goes on."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from hydra_plugins.pare.grid import launch_all
from tests.conftest import CONFIGS, SMALL, Command
from tests.test_cli import ROOT
from tests.test_config import problems
from tests.test_sweep import rows_of
from utils import cli, starter
from utils.cli import parse_command_line
from utils.engines import engine_environment
from utils.errors import InputError, RunError
from utils.files import why_not_writable
from utils.locks import Owner, place
from utils.sweeping import Sweep, prepared

FAST = [s for s in SMALL if not s.startswith("evals.")]
JOBS = [["a=1"], ["a=2"], ["a=3"]]


class Launches:
    """A launcher whose jobs all fail, or whose place is full."""

    def __init__(self, refusal: OSError | None = None) -> None:
        self.refusal = refusal
        self.launched: list[tuple[list[list[str]], int]] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.launched.append(([list(job) for job in jobs], initial_job_idx))
        if self.refusal is not None:
            raise self.refusal
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = RunError("failed")
        return [failed for _ in jobs]


@pytest.mark.parametrize(
    ("size", "batches"), [(None, [(JOBS, 0)]), (2, [(JOBS[:2], 0), (JOBS[2:], 2)]), (9, [(JOBS, 0)])]
)
def test_every_batch_is_launched_whatever_failed(size: int | None, batches: Any, tmp_path: Path) -> None:
    launcher: Any = Launches()
    assert len(launch_all(launcher, JOBS, size, tmp_path)) == 3 and launcher.launched == batches


def test_a_place_that_no_job_can_be_made_in_ends_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher: Any = Launches(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SystemExit) as ended:
        launch_all(launcher, JOBS, 1, tmp_path)
    assert ended.value.code == 1 and len(launcher.launched) == 1
    assert capsys.readouterr().err == f"{tmp_path}: cannot be written (No space left on device); the sweep ends\n"
    with pytest.raises(OSError, match="Interrupted"):  # what is no place's fault keeps its traceback
        launch_all(Launches(OSError(errno.EINTR, "Interrupted")), JOBS, 1, tmp_path)  # type: ignore[arg-type]


def test_a_sweep_without_room_for_its_table_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(sweep: Path) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device", str(sweep / "results.csv"))

    monkeypatch.setattr(cli, "close", full)
    assert cli.swept(lambda: None, Sweep(tmp_path, [])) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith(f"{tmp_path}/results.csv: cannot be read or written (No space left") and said.count("\n") == 1
    )


def test_a_full_place_is_found_before_any_work(tmp_path: Path, monkeypatch) -> None:
    def full(**settings: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert why_not_writable(tmp_path / "new") is None and not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert why_not_writable(tmp_path / "new") == "No space left on device"


def test_one_failed_job_ends_no_other(forked: Command, tmp_path: Path) -> None:
    """One job at a time, the first one out of reach."""
    given = ["prune=random", "prune.ratio=0.99,0.2", "hydra.sweeper.max_batch_size=1", "evals=[macs]", *FAST]
    done = forked("-m", *given, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "job 0 failed: prune.ratio=0.99" in done.stderr and "1 of 2 jobs have no good result" in done.stdout
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["failed", "ok"]


@pytest.mark.parametrize("subdir", ["../../elsewhere", "job_${hydra.job.num}", "${hydra.job.num}/../..", "7"])
def test_jobs_lie_where_the_table_looks(subdir: str) -> None:
    (found,) = problems("-m", "prune.ratio=0.2,0.3", f"hydra.sweep.subdir='{subdir}'")
    assert found.startswith(f"hydra.sweep.subdir={subdir}: must be ${{hydra.job.num}}")
    assert problems("-m", "prune.ratio=0.2,0.3", "hydra.sweep.subdir=${hydra.job.num}") == []
    assert problems(f"hydra.sweep.subdir='{subdir}'") == [], "a single run has none"


def test_hydras_own_keys_hold_for_the_whole_sweep() -> None:
    (found,) = problems("-m", "hydra.sweep.dir=a,b")
    assert found == "hydra.sweep.dir=a,b: must be one value, as Hydra's own keys hold for the whole sweep"


@pytest.mark.parametrize("value", ["${nope}", "???"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_folder_that_leads_nowhere_is_a_message(key: str, value: str) -> None:
    sweep = ["-m"] if "sweep" in key else []
    line = parse_command_line([*sweep, f"{key}={value}"], CONFIGS)
    with pytest.raises(InputError, match=rf"{key}: must be a folder \((Interpolation key 'nope'|Missing)"):
        prepared(line, None)  # type: ignore[arg-type]


def started_by(owner: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A job that says that it is through after a second, in a process that another one started."""
    job = "import time; from utils.starter import end_with_starter as e; e(); e(); time.sleep(1); print('through')"
    told = os.environ | {starter.VARIABLE: starter.json.dumps(owner)}
    return subprocess.run([sys.executable, "-c", job], cwd=ROOT, env=told, capture_output=True, text=True, timeout=60)


def test_a_job_ends_with_the_process_that_started_its_sweep() -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = Owner("t", place(), int(ended.stdout), "1")
    assert started_by(vars(gone)).returncode == starter.TERMINATED and started_by(vars(gone)).stdout == ""
    for living in (vars(Owner.this()), vars(gone) | {"place": "another machine"}, {}):
        job = started_by(living)
        assert (job.returncode, job.stdout) == (0, "through\n"), living


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", True),
        ("hydra_plugins.pare.local_jobs.LocalJobs", True),
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", False),
    ],
)
def test_who_is_told_which_process_starts(target: str, told: bool) -> None:
    found = engine_environment(OmegaConf.create({"launcher": {"_target_": target}}))
    assert (starter.VARIABLE in found) == told
