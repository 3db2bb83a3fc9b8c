"""The command line in its own process, or a fork of one: exit codes, messages, sweeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL, Command

ROOT = Path(__file__).parent.parent


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_one_run_prints_its_table(tmp_path: Path) -> None:
    done = call(*SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and "of the macs removed" in done.stdout
    (found,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(found.read_text())["command"].startswith("python main.py model.width=16")
    assert (tmp_path / "storage" / "vision" / "digits" / "toy_encoder").is_dir()


def test_a_sweep_ranks_once_and_survives_a_failing_job(forked: Command, tmp_path: Path) -> None:
    small = [s for s in SMALL if not s.startswith("evals.")]
    done = forked("-m", "prune.ratio=0.2,0.99,0.3", "evals=[accuracy,macs]", *small, cwd=tmp_path)
    assert done.returncode == 1
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("multirun/*/*/*/result.json"))]
    assert [r["status"] for r in results] == ["ok", "failed", "ok"]
    assert "prune.ratio=0.99" in results[1]["error"]
    assert [r["cache"]["hit"] for r in results] == [False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune.ratio=1.5",), "prune.ratio=1.5: must be in [0, 1)"),
        (("prune=nope",), "prune has no option 'nope'"),
        (("-m", "prune.ratio=0.1,2"), "prune.ratio=2: must be in [0, 1)"),
        (("prune.ratio=0.99", *SMALL), "reachable minimum"),
        (("device=cuda", *SMALL), "device=cuda"),
        (("model.image_size=7", *SMALL), "model.image_size=7: must be a multiple of model.patch_size=2"),
    ],
)
def test_wrong_input_exits_with_2_and_one_message(
    forked: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    import torch

    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = forked(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job"), ("--info", "defaults-tree")])
def test_showing_works(forked: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = forked(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "prune" in done.stdout
