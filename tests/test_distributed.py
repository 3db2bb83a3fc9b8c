"""One run in several processes: results of a single one, one voice, and an end for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prune.recovery.finetune import Finetune
from prune.recovery.lora import Lora
from tests.conftest import SMALL, Command
from tests.distributed_worker import CASES, FAILING, sample
from tests.faults import Runner
from utils.distributed import Turns, divided, gathered, own_rows, summed
from utils.errors import InputError
from utils.launched import follower_arguments, launched

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TINY = [*(s for s in SMALL if not s.startswith("evals.")), "evals=[accuracy,macs]"]
RECOVERED = [*TINY, "recover=finetune", "recover.epochs=1"]
# what a single process finds to the last bit; the others to rounding, as gradients are summed in another order
ROUNDED = {
    "finetune": 1e-5, "finetune_llama": 1e-5, "distill": 1e-5, "sharded_llama": 1e-5, "sharded_checkpointed": 1e-5,
    "masked_shards": 1e-5, "lora": 1e-5, "lora_llama": 1e-5,
    "adamw": 1e-5, "lora_adamw": 1e-5,
}  # fmt: skip
OWN = {"stored", "timed"}


def torchrun(processes: int, *arguments: str, cwd: Path, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, **settings
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three processes found, each of them."""
    folder = tmp_path_factory.mktemp("worker")
    started = torchrun(3, "-m", "tests.distributed_worker", str(folder), cwd=ROOT)
    _, errors = started.communicate(timeout=900)
    assert started.returncode == 0, errors[-4000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in OWN])
def test_three_processes_find_what_one_finds(found: list[dict[str, Any]], name: str) -> None:
    assert max(of[name] for of in found) <= ROUNDED.get(name, 0.0)


@pytest.mark.slow
def test_gradients_are_really_divided(found: list[dict[str, Any]]) -> None:
    """Sums in another order differ in their last bits; equal ones would mean that each process did all."""
    assert any(found[0][name] > 0 for name in ROUNDED)


def test_only_rounding_moves_a_keys_bias() -> None:
    """Why Adam's weights are compared without them: their gradient is zero, and Adam's steps do not know how small."""
    model, data = sample("deit")
    model.network.double()
    batch = model.place(next(iter(data.train)))
    data.task.loss(model.logits(batch), batch).backward()
    biases = [p.grad for name, p in model.network.named_parameters() if name.endswith("qkv.bias")]
    assert len(biases) == 2
    for bias in biases:
        assert bias is not None
        query, key, value = bias.abs().chunk(3)
        assert key.max() < 1e-12 and min(query.max(), value.max()) > 1e-6


@pytest.mark.slow
def test_the_first_process_computes_alone_what_a_clock_tells(found: list[dict[str, Any]]) -> None:
    for of in found:
        assert of["timed"] == {"measured": True}
        assert of["stored"] == {"hits": [False, True, False], "by": 0, "rows": [*range(7)], "calls": 1}
        assert of["described"] == {"world_size": 3, "backend": "gloo"}


@pytest.mark.slow
def test_all_processes_end_with_the_error_of_one(found: list[dict[str, Any]]) -> None:
    refused = "InputError: data.root=/nowhere: must be a folder"
    ends = [of["ends"] for of in found]
    assert all(len(of) == len(FAILING) for of in ends)
    assert [of[0] for of in ends] == [refused] * 3
    assert ends[0][1] == ends[1][1] == "RunError: process 2: ValueError: unforeseen"
    assert ends[2][1] == "RunError: ValueError: unforeseen"
    assert [of[2] for of in ends] == ["InputError: prune.ratio=0.99: too much"] * 3
    assert all(of[3].startswith("KeyboardInterrupt") for of in ends)
    assert all(of[4].startswith("RunError: another process of this run ended") for of in ends)


def test_a_run_prints_and_writes_once(runs: Runner, forked: Command, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    done = runs.run(tmp_path, RECOVERED, at_once=2, whole=True, environments=both)
    assert [of.code for of in done] == [0, 0], done[0].err + done[1].err
    said_and_written_once(done[0].out + done[1].out, tmp_path, forked)


@pytest.mark.slow
def test_a_run_that_torchrun_starts_prints_and_writes_once(forked: Command, tmp_path: Path) -> None:
    started = torchrun(2, str(ROOT / "main.py"), *RECOVERED, cwd=tmp_path)
    out, errors = started.communicate(timeout=600)
    assert started.returncode == 0, errors[-3000:]
    said_and_written_once(out, tmp_path, forked)


def said_and_written_once(out: str, folder: Path, forked: Command) -> None:
    assert out.count("of the macs removed") == 1
    (path,) = folder.glob("outputs/*/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "ok" and result["device"]["world_size"] == 2 and result["device"]["backend"] == "gloo"
    assert result["recovery"]["processes"] == {"world_size": 2, "each": "its rows of every batch", "sharded": False}
    assert result["pruned"]["accuracy"]["measured_by"] == "2 processes"
    assert result["pruned"]["macs"]["measured_by"] == "1 of 2 processes, the others waiting"
    assert "in 2 processes (gloo)" in (path.parent / "report.md").read_text()
    alone = forked(*TINY, cwd=folder)
    assert alone.returncode == 0, alone.stderr
    second = json.loads(max(folder.glob("outputs/*/*/result.json")).read_text())
    # what two processes have ranked is there for one: the same key, and so the same plan
    assert second["cache"] == {**result["cache"], "hit": True} and second["plan"] == result["plan"]
    assert second["dense"]["accuracy"]["value"] == result["dense"]["accuracy"]["value"]


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    start = time.monotonic()
    started = torchrun(2, str(ROOT / "main.py"), "prune.ratio=high", "recover.sharded=7", cwd=tmp_path)
    _, errors = started.communicate(timeout=300)
    assert started.returncode != 0 and time.monotonic() - start < 150
    assert errors.count("prune.ratio") == 1 and errors.count("recover.sharded") <= 1
    assert errors.count("exitcode  : 2") == 2, errors
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    started = torchrun(2, str(ROOT / "main.py"), "model.training.epochs=400", cwd=tmp_path, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while not list(tmp_path.glob("storage/**/*.partial")) and time.monotonic() < until:
            time.sleep(0.2)
        os.kill(_process_of(started.pid, rank=1), signal.SIGKILL)
        _, errors = started.communicate(timeout=90)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0
    assert errors.count("another process of this run ended") == 1
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(path.read_text())["status"] == "failed"


def _process_of(launcher: int, rank: int) -> int:
    """The process that a launcher started as some rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def placed(monkeypatch: pytest.MonkeyPatch, rank: str = "0", world: str = "2") -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("rank", "world", "several"), [("1", "2", True), ("0", "1", False), ("x", "2", False)])
def test_a_process_is_one_of_several_only_where_a_launcher_says_so(
    monkeypatch: pytest.MonkeyPatch, rank: str, world: str, several: bool
) -> None:
    assert launched() is None
    placed(monkeypatch, rank, world)
    assert (launched() is not None) == several


def test_a_sweep_is_refused() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, str(ROOT / "main.py"), "-m", "prune.ratio=0.2,0.3"]
    done = subprocess.run(command, env=ENVIRONMENT | place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("-m: a sweep can't be started by torchrun")


def test_weights_are_divided_only_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="recover.sharded=true"):
        Finetune(sharded=True)
    placed(monkeypatch)
    assert Finetune(sharded=True).sharded
    with pytest.raises(InputError, match="recover=lora"):
        Lora(sharded=True)


def test_followers_leave_hydra_nothing_to_write() -> None:
    given = ["prune=optin", "hydra.run.dir=here", "--config-dir", "x"]
    found = follower_arguments(given)
    assert found[0] == "prune=optin" and found[-2:] == ["--config-dir", "x"] and "hydra.run.dir=here" not in found
    assert "hydra.output_subdir=null" in found and "hydra/job_logging=disabled" in found


def test_a_single_process_does_all_of_it_itself() -> None:
    assert [fact for _, fact in divided("abc", lambda letter: ({}, letter))] == ["a", "b", "c"]
    assert gathered(({}, 1)) == [({}, 1)] and own_rows(5) == slice(0, 5) and Turns().own(3)
    assert torch.equal(summed({"x": torch.ones(2)})["x"], torch.ones(2))


@pytest.mark.gpu
def test_gpus_divide_a_run(tmp_path: Path) -> None:
    """As many processes as there are GPUs, at most two; with one of them there is nothing to divide."""
    count = min(2, torch.cuda.device_count())
    started = torchrun(count, str(ROOT / "main.py"), *RECOVERED, cwd=tmp_path)
    _, errors = started.communicate(timeout=500)
    assert started.returncode == 0, errors[-3000:]
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    device = json.loads(path.read_text())["device"]
    assert device["type"] == "cuda" and device.get("backend", "nccl") == "nccl"
    assert device.get("world_size", 1) == count
