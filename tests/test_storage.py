"""The cache: found again, recomputed when damaged, computed once across processes."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from utils.errors import InputError
from utils.files import write_atomically
from utils.storage import Artifact, Fetched, Scratch, Store, folder_name, key_hash

KEY = {"weights": "abc", "batch": 64}
# of a process that has imported this file once
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_storage"])


class Counter:
    """A computation that counts how often it ran."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.runs = value, 0

    def __call__(self, scratch: Scratch) -> Artifact:
        self.runs += 1
        return Artifact({"scores": torch.full((3,), self.value)}, {"note": "made"})


def fetch(root: Path, compute, key: dict = KEY) -> Fetched:
    return Store(root).fetch("vision/digits/toy", "fisher", key, compute)


def test_second_time_it_is_a_hit(tmp_path: Path) -> None:
    compute = Counter()
    first, second = fetch(tmp_path, compute), fetch(tmp_path, compute)
    assert (first.hit, second.hit, compute.runs) == (False, True, 1)
    assert torch.equal(first.artifact.tensors["scores"], second.artifact.tensors["scores"])
    assert second.artifact.facts == {"note": "made"}
    assert second.path == tmp_path / "vision/digits/toy" / f"fisher-{key_hash(KEY)[:16]}.safetensors"
    twin = json.loads(second.path.with_suffix(".json").read_text())
    assert twin["key"] == KEY and twin["facts"] == {"note": "made"}


def test_another_key_is_a_miss(tmp_path: Path) -> None:
    compute = Counter()
    fetch(tmp_path, compute)
    assert not fetch(tmp_path, compute, KEY | {"batch": 32}).hit
    assert compute.runs == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_a_digit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"64", b"65").replace(b"made", b"fake"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_computed_again(tmp_path: Path, suffix: str, damage, caplog) -> None:
    path = fetch(tmp_path, Counter()).path
    damage(path.with_suffix(suffix))
    again = Counter(2.0)
    found = fetch(tmp_path, again)
    assert again.runs == 1 and not found.hit and found.artifact.tensors["scores"][0] == 2
    if path.with_suffix(suffix).exists() and damage is not Path.unlink:
        assert "damaged" in caplog.text
    assert fetch(tmp_path, Counter()).hit


def test_an_altered_twin_is_noticed(tmp_path: Path, caplog) -> None:
    path = fetch(tmp_path, Counter()).path
    change_a_digit(path.with_suffix(".json"))
    assert not fetch(tmp_path, Counter()).hit and "damaged" in caplog.text
    twin = path.with_suffix(".json")
    twin.write_bytes(twin.read_bytes().replace(b'"made"', b'"fake"'))
    assert not fetch(tmp_path, Counter()).hit, "facts are covered by the checksum too"


def test_a_failing_computation_leaves_what_was_there(tmp_path: Path) -> None:
    fetch(tmp_path, Counter())
    with pytest.raises(ZeroDivisionError):
        fetch(tmp_path, lambda scratch: 1 / 0, KEY | {"batch": 1})  # type: ignore[arg-type, return-value]
    assert fetch(tmp_path, Counter()).hit
    files = {p.suffix for p in (tmp_path / "vision/digits/toy").iterdir() if not p.name.startswith(".")}
    assert files <= {".safetensors", ".json", ".lock"}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_an_interrupted_computation_goes_on_from_its_scratch(tmp_path: Path) -> None:
    def interrupted(scratch: Scratch) -> Artifact:
        scratch.save(Artifact({"half": torch.arange(3)}, {"done": 3}))
        raise KeyboardInterrupt

    def resumed(scratch: Scratch) -> Artifact:
        left = scratch.load()
        assert left is not None and left.facts == {"done": 3}
        return Artifact({"whole": left.tensors["half"] * 2}, {})

    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, interrupted)
    assert fetch(tmp_path, resumed).artifact.tensors["whole"].tolist() == [0, 2, 4]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_scratch_is_left_aside(tmp_path: Path, caplog) -> None:
    scratch = Scratch(tmp_path / "x.partial")
    assert scratch.load() is None
    scratch.save(Artifact({"half": torch.arange(3)}, {}))
    truncate(scratch.path)
    assert scratch.load() is None and "damaged" in caplog.text


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def slow_fetch(root: Path, log: Path) -> None:
    def compute(scratch: Scratch) -> Artifact:
        with log.open("a") as file:
            file.write("ran\n")
        time.sleep(1.0)
        return Artifact({"scores": torch.ones(2)}, {})

    fetch(root, compute)


def test_two_processes_compute_once(tmp_path: Path) -> None:
    workers = [FORKS.Process(target=slow_fetch, args=(tmp_path / "s", tmp_path / "log")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "ran\n"


def hang(root: Path, log: Path) -> None:
    def compute(scratch: Scratch) -> Artifact:
        log.write_text("locked")
        time.sleep(600)
        raise AssertionError

    fetch(root, compute)


def test_a_dead_process_does_not_block(tmp_path: Path) -> None:
    worker = FORKS.Process(target=hang, args=(tmp_path / "s", tmp_path / "log"))
    worker.start()
    while not (tmp_path / "log").exists():
        assert worker.is_alive()
        time.sleep(0.05)
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    start = time.perf_counter()
    assert not fetch(tmp_path / "s", Counter()).hit
    assert time.perf_counter() - start < 5


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="storage: cannot write .*file"):
        fetch(tmp_path / "file", Counter())
    assert (tmp_path / "file").read_text() == "in the way"


def test_folder_names_stay_inside_the_root() -> None:
    assert folder_name("meta-llama/Llama-3.2-1B") == "meta-llama-Llama-3.2-1B"
    assert folder_name("../../etc") == "etc"
    assert folder_name("/") == "unnamed"
