"""Runs that are killed, stopped, or out of room: what they leave, and that the same command ends the same."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL
from tests.faults import Fault, Kind, Runner
from utils.errors import InputError, RunError
from utils.files import remove_abandoned, write_atomically
from utils.locks import place
from utils.storage import Artifact, Scratch, Store

TINY = [s for s in SMALL if not s.startswith("evals.")]
# ranking, recovery and saving, in a run of a second
RUN = [*TINY, "prune=optin", "prune.engine=exact", "recover=finetune", "recover.epochs=3", "save=true",
       "evals=[accuracy,loss]", "storage=storage"]  # fmt: skip
SWEEP = ["-m", *TINY, "prune=fisher,taylor", "prune.ratio=0.3", "evals=[accuracy,loss]", "storage=storage",
         "hydra.sweep.dir=sweep"]  # fmt: skip
Found = dict[str, object]


def bits(folder: Path, out: str = "out0") -> Found:
    """Everything that must not depend on what happened on the way: arrays, plans, figures."""
    found: Found = {str(p.relative_to(folder)): p.read_bytes() for p in visible(folder, ".safetensors")}
    for path in visible(folder, "plan.json"):
        found[str(path.relative_to(folder))] = json.loads(path.read_text())
    for path in visible(folder, "result.json"):
        result = json.loads(path.read_text())
        sides = {s: {n: m["value"] for n, m in result[s].items()} for s in ("dense", "pruned")}
        found[str(path.relative_to(folder))] = [result["status"], result["fingerprints"], sides]
    return found


def visible(folder: Path, end: str) -> list[Path]:
    """Files that anyone would read; temporary names begin with a dot, and are nobody's."""
    paths = sorted(p for p in folder.rglob(f"*{end}") if p.is_file())
    return [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def whole(folder: Path) -> None:
    """No file is half written."""
    for path in visible(folder, ".json"):
        json.loads(path.read_text())
    for path in visible(folder, ".safetensors"):
        load_file(path)


def settled(folder: Path) -> None:
    """Nothing is left of a run that was killed."""
    left = [
        p.name for p in (folder / "storage").rglob("*") if p.name.endswith((".partial", ".lock")) or p.name[0] == "."
    ]
    drafts = [name for name in left if not name.startswith(".") or ".lock-" not in name]
    assert not drafts, drafts


def moments(events: int, count: int, seed: int) -> list[int]:
    """Moments spread over a run, drawn anew in each part of it."""
    draws, step = random.Random(seed), events / count
    return [1 + int(number * step + draws.random() * step) for number in range(count)]


def killed_and_resumed(runs: Runner, folder: Path, wanted: Found, fault: Fault) -> None:
    (done,) = runs.run(folder, RUN, fault)
    assert done.code in (-9, 0), done.err  # a run may have fewer events than the one that counted them
    whole(folder)
    (again,) = runs.run(folder, RUN)
    assert again.code == 0, (fault, again.err)
    whole(folder)
    settled(folder)
    found = bits(folder)
    assert found.keys() == wanted.keys(), fault
    assert [name for name in wanted if found[name] != wanted[name]] == [], fault


@pytest.fixture(scope="module")
def undisturbed(runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, dict[str, int]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (done,) = runs.run(folder, RUN)
    assert done.code == 0, done.err
    return bits(folder), done.events


def test_a_killed_run_ends_the_same(runs: Runner, undisturbed: tuple[Found, dict[str, int]], tmp_path: Path) -> None:
    wanted, events = undisturbed
    kept = [name for name in wanted if name.endswith(".safetensors")]
    assert len(kept) == 7, "training, scores, recovery, answers, what is right in them"
    kinds: list[Kind] = ["file", "call"]
    for kind in kinds:
        for at in moments(events[kind], 2, seed=time.time_ns() % 1000):
            killed_and_resumed(runs, tmp_path / f"{kind}{at}", wanted, Fault("kill", at, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "call"])
def test_a_run_killed_anywhere_ends_the_same(
    runs: Runner, undisturbed: tuple[Found, dict[str, int]], tmp_path: Path, kind: Kind
) -> None:
    wanted, events = undisturbed
    for at in moments(events[kind], 22, seed=1):
        killed_and_resumed(runs, tmp_path / str(at), wanted, Fault("kill", at, kind))


@pytest.mark.slow
def test_a_sweep_killed_anywhere_ends_the_same(runs: Runner, tmp_path: Path) -> None:
    (done,) = runs.run(tmp_path / "undisturbed", SWEEP, whole=True)
    assert done.code == 0, done.err
    wanted = bits(tmp_path / "undisturbed")
    for number, at in enumerate(moments(done.events["file"], 8, seed=2)):
        command = [*SWEEP, "resume=sweep"] if number % 2 and at > 40 else SWEEP
        folder = tmp_path / str(at)
        (killed,) = runs.run(folder, SWEEP, Fault("kill", at), whole=True)
        assert killed.code == -9
        whole(folder)
        (again,) = runs.run(folder, command if (folder / "sweep").is_dir() else SWEEP, whole=True)
        assert again.code == 0, again.err
        whole(folder)
        assert bits(folder) == wanted


@pytest.mark.slow
def test_a_run_killed_twice_while_it_recovers(
    runs: Runner, undisturbed: tuple[Found, dict[str, int]], tmp_path: Path
) -> None:
    wanted, _ = undisturbed
    for epoch in (1, 2):
        (done,) = runs.run(tmp_path, RUN, Fault("kill", 4 * epoch, inside="recovered-finetune"))
        assert done.code == -9
    killed_and_resumed(runs, tmp_path, wanted, Fault("kill", 9, inside="model"))


STOPS = [
    pytest.param("interrupt", 130, "ranking", "optin-"),
    pytest.param("interrupt", 130, "recovery", "recovered-", marks=pytest.mark.slow),
    pytest.param("interrupt", 130, "evaluation", "predictions-"),
    pytest.param("terminate", 143, "recovery", "recovered-"),
]


@pytest.mark.parametrize(("what", "code", "where", "inside"), STOPS)
def test_a_stopped_run_keeps_what_it_has(
    runs: Runner, tmp_path: Path, what: str, code: int, where: str, inside: str
) -> None:
    command = [*RUN, "hydra.run.dir=out0"]
    (done,) = runs.run(tmp_path, command, Fault(what, 3, inside=inside), whole=True)
    assert done.code == code, done.err
    assert "what was finished is kept" in done.err and "Traceback" not in done.err
    result = json.loads((tmp_path / "out0" / "result.json").read_text())
    assert result["status"] == "failed" and ("interrupted" in result["error"] or "terminated" in result["error"])
    assert (tmp_path / "out0" / "plan.json").is_file() == (where != "ranking")
    assert result["seconds"]["train"] > 0 and list((tmp_path / "storage").rglob("checkpoint-*.json"))
    whole(tmp_path)
    assert not list(tmp_path.rglob("*.lock"))


REFUSED = [("ENOSPC", "checkpoint-"), ("EACCES", "optin-")]
REFUSED_ELSEWHERE = [
    ("ENOSPC", "optin-"), ("ENOSPC", "plan.json"), ("ENOSPC", "result.json"), ("EACCES", "result.json"),
    ("EROFS", "optin-"), ("EDQUOT", "recovered-"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "inside"), [*REFUSED, *(pytest.param(*case, marks=pytest.mark.slow) for case in REFUSED_ELSEWHERE)]
)
def test_a_place_that_refuses_is_named(runs: Runner, tmp_path: Path, name: str, inside: str) -> None:
    (done,) = runs.run(tmp_path, [*RUN, "hydra.run.dir=out0"], Fault(name, 1, lasting=True, inside=inside), whole=True)
    assert done.code in (1, 2), done.err
    assert inside in done.err or "storage: cannot write" in done.err
    assert "Traceback" not in done.err and len([x for x in done.err.splitlines() if "cannot" in x]) == 1
    whole(tmp_path)
    assert not [p for p in tmp_path.rglob(".*-*") if inside in p.name and p.suffix != ".lock"], "a draft was left"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 256 kB, where this process may mount one."""
    room = tmp_path / "room"
    room.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=256k none {room} 2>/dev/null") != 0:
        pytest.skip("no file system may be mounted here")
    try:
        store = Store(room)
        store.fetch("f", "small", {"k": 1}, lambda scratch: Artifact({"x": torch.ones(10)}, {}))

        def large(scratch: Scratch) -> Artifact:
            scratch.save(Artifact({"x": torch.ones(100_000)}, {}))  # no room: goes on
            return Artifact({"x": torch.ones(100_000)}, {})

        with pytest.raises(RunError, match=r"cannot write .*large-.*No space left.*storage="):
            store.fetch("f", "large", {"k": 1}, large)
        assert store.fetch("f", "small", {"k": 1}, large).hit, "what was there is whole"
        assert sorted(p.suffix for p in room.rglob("*") if p.is_file()) == [".json", ".safetensors"]
    finally:
        os.system(f"umount {room}")


def test_a_limit_on_file_sizes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match="cannot write .*File too large"):
            Store(tmp_path).fetch("f", "n", {}, lambda scratch: Artifact({"x": torch.ones(100_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(InputError, match="storage: cannot write"):
        Store(tmp_path / "s").fetch("f", "n", {}, lambda scratch: Artifact({}, {}))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b[:20]]
)
def test_a_damaged_half_done_file_is_not_gone_on_from(tmp_path: Path, damage, caplog) -> None:
    scratch = Scratch(tmp_path / "x.partial")
    scratch.save(Artifact({"weights": torch.arange(9.0)}, {"epoch": 3}))
    assert scratch.load() is not None
    scratch.path.write_bytes(damage(scratch.path.read_bytes()))
    assert scratch.load() is None and "x.partial is damaged" in caplog.text


def test_a_half_done_file_with_other_facts_is_not_gone_on_from(tmp_path: Path, caplog) -> None:
    scratch = Scratch(tmp_path / "x.partial")
    scratch.save(Artifact({"weights": torch.arange(9.0)}, {"epoch": 3}))
    scratch.path.write_bytes(scratch.path.read_bytes().replace(b"epoch", b"EPOCH"))
    assert scratch.load() is None and "checksum" in caplog.text


@pytest.mark.parametrize("stamp", [4_000_000_000, pytest.param(1, marks=pytest.mark.slow)])
def test_a_clock_that_jumped_changes_nothing(
    runs: Runner, undisturbed: tuple[Found, dict[str, int]], tmp_path: Path, stamp: int
) -> None:
    wanted, events = undisturbed
    (done,) = runs.run(tmp_path, RUN, Fault("kill", events["file"] // 2))
    assert done.code == -9 and list(tmp_path.rglob("storage/**/*.*"))
    for path in tmp_path.rglob("*"):
        os.utime(path, (stamp, stamp))
    (again,) = runs.run(tmp_path, RUN)
    assert again.code == 0 and bits(tmp_path) == wanted


def test_two_runs_race_for_the_same_keys(
    runs: Runner, undisturbed: tuple[Found, dict[str, int]], tmp_path: Path
) -> None:
    wanted, _ = undisturbed
    done = runs.run(tmp_path, RUN, at_once=2)
    assert [end.code for end in done] == [0, 0], done[0].err + done[1].err
    whole(tmp_path)
    settled(tmp_path)
    hits = [json.loads((tmp_path / f"out{n}" / "result.json").read_text())["cache"]["hit"] for n in range(2)]
    assert sorted(hits) == [False, True], "ranked once"
    found = bits(tmp_path)
    for name, content in wanted.items():
        assert found[name] == content and found[name.replace("out0", "out1")] == content, name


def test_a_dead_process_leaves_a_lock_and_a_draft(runs: Runner, tmp_path: Path) -> None:
    (done,) = runs.run(tmp_path, RUN, Fault("kill", 4, inside="checkpoint-"))
    assert done.code == -9 and list(tmp_path.rglob("checkpoint-*.lock"))
    start = time.monotonic()
    (again,) = runs.run(tmp_path, RUN)
    assert again.code == 0 and time.monotonic() - start < 55, "waited for a dead process"
    settled(tmp_path)


def test_drafts_of_living_processes_and_other_machines_stay(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"whole")
    import hashlib

    here = hashlib.sha256(place().encode()).hexdigest()[:12]
    drafts = [f".a-{here}-{os.getpid()}-x", f".a-0123456789ab-{2**22 + 1}-x", f".ab-{here}-{2**22 + 1}-x"]
    for name in [*drafts, f".a-{here}-{2**22 + 1}-x"]:
        (tmp_path / name).touch()
    remove_abandoned(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a", *drafts])
