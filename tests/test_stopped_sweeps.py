"""Sweeps through launchers that are stopped: exit code, what is kept, and that no process goes on alone (slow)."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.test_cli import ROOT
from tests.test_engines import ENGINES, needs
from tests.test_sweep import rows_of
from utils import cli

FAST = [s for s in SMALL if not s.startswith("evals.")]
MARK = "PARE_TEST_STOPPED"
# a Ctrl-C reaches everything that a terminal runs in front; other signals reach the process that they are sent to
STOPS = {"ctrl-c": (signal.SIGINT, True, 130), "int": (signal.SIGINT, False, 130), "term": (signal.SIGTERM, False, 143)}


def marked(mark: str) -> dict[int, str]:
    """Living processes that were started with a mark in their environment, and their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not true():
        time.sleep(0.2)
    return true()


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A mark for what a test starts; what is left of it is ended."""
    yield str(tmp_path)
    for pid in marked(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_sweep_keeps_what_it_has(engine: str, how: str, tmp_path: Path, mark: str) -> None:
    arguments, modules = ENGINES[engine]
    needs("hydra_plugins", *modules)
    number, everyone, code = STOPS[how]
    sweep = tmp_path / "sweep"
    long = ["recover=finetune", "recover.epochs=1,100000", "evals=[accuracy]", f"hydra.sweep.dir={sweep}"]
    line = [sys.executable, str(ROOT / "main.py"), "-m", *FAST, *long, *arguments]
    running = subprocess.Popen(
        line, cwd=tmp_path, start_new_session=True, env=os.environ | {MARK: mark}, stderr=subprocess.PIPE, text=True
    )
    started = lambda: (sweep / "1" / "plan.json").is_file() and (sweep / "0" / "result.json").is_file()  # noqa: E731
    assert until(started, seconds=600)
    (os.killpg if everyone else os.kill)(running.pid, number)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == code, errors[-3000:]
    assert cli.KEPT in errors or cli.KEPT.replace("interrupted", "terminated") in errors
    # submitit's own process beside each job says where it was when it was interrupted
    assert "Traceback" not in errors or engine == "submitit_local"
    rows = rows_of(sweep)
    assert rows[0]["status"] == "ok" and len(rows) == 2 and rows[1]["status"] in ("failed", "unfinished")
    assert until(lambda: not marked(mark), seconds=60), marked(mark)


@pytest.mark.slow
def test_a_sweep_joins_a_running_cluster(tmp_path: Path, mark: str) -> None:
    """One that `ray start` began, by its address; where none answers, one line says so."""
    needs("ray", "hydra_plugins", "hydra_plugins.hydra_ray_launcher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sweep = ["-m", "prune=random", "prune.ratio=0.2,0.3", "evals=[macs]", *FAST, "hydra/launcher=ray"]
    line = [sys.executable, str(ROOT / "main.py"), *sweep, f"hydra.launcher.ray.init.address=127.0.0.1:{port}"]
    nobody = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert nobody.returncode == 2 and "Traceback" not in nobody.stderr
    assert f"hydra.launcher.ray.init.address=127.0.0.1:{port}: must be the address" in nobody.stderr
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=2"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    cluster = subprocess.run(
        [*start, *quiet], cwd=tmp_path, env=os.environ | {MARK: mark}, capture_output=True, text=True, timeout=600
    )
    assert cluster.returncode == 0, cluster.stderr
    done = subprocess.run([*line, "hydra.sweep.dir=sweep"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["ok", "ok"]
