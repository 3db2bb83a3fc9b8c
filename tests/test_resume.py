"""`resume=<sweep folder>`: jobs are matched by their overrides, and only those without a good result are done."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from evals import sweep as sweeps
from evals.sweep import close, refresh
from tests.conftest import CONFIGS, SMALL, Command
from tests.test_sweep import rows_of
from utils.errors import InputError
from utils.jobs import is_done, jobs_of, matched, missing
from utils.locks import Lock

FAST = [s for s in SMALL if not s.startswith("evals.")]
TYPED = ["prune=taylor,random", "prune.ratio=0.2,0.4"]


WHOLE = {
    "dense": {}, "pruned": {}, "error": None, "method": "m", "plan": None, "cache": {"hit": False},
    "seconds": {"total": 1.0}, "recovery": None, "history": [],
}  # fmt: skip


@pytest.fixture
def loader() -> Iterator[ConfigLoader]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def made(folder: Path, typed: Sequence[str], jobs: Sequence[Sequence[str]], status: Sequence[str]) -> Path:
    """A sweep's folder as a run leaves it."""
    folder.mkdir()
    hydra = {"overrides": {"task": list(typed)}, "sweeper": {"params": None}}
    OmegaConf.save(OmegaConf.create({"hydra": hydra}), folder / "multirun.yaml")
    for number, (job, state) in enumerate(zip(jobs, status, strict=True)):
        (folder / str(number) / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(list(job)), folder / str(number) / ".hydra" / "overrides.yaml")
        if state:
            (folder / str(number) / "result.json").write_text(json.dumps(WHOLE | {"status": state}))
    return folder


@pytest.fixture
def sweep(tmp_path: Path, loader: ConfigLoader) -> Path:
    """Four jobs: good, failed, killed, never started."""
    jobs = jobs_of(TYPED, None, loader)
    return made(tmp_path / "sweep", TYPED, jobs[:3], ["ok", "failed", ""])


def test_the_same_command_gives_what_is_missing(sweep: Path, loader: ConfigLoader) -> None:
    found = missing(jobs_of(TYPED, None, loader), sweep, loader)
    assert [(job.number, job.overrides) for job in found] == [
        (1, ("prune=taylor", "prune.ratio=0.4")),
        (2, ("prune=random", "prune.ratio=0.2")),
        (3, ("prune=random", "prune.ratio=0.4")),
    ]


def test_jobs_are_matched_by_overrides_and_not_by_number(sweep: Path, loader: ConfigLoader) -> None:
    turned = jobs_of(["prune.ratio=0.4,0.2", "prune=random,taylor"], None, loader)
    found = {job.number: set(job.overrides) for job in matched(turned, sweep, loader)}
    assert found[0] == {"prune=taylor", "prune.ratio=0.2"} and found[3] == {"prune=random", "prune.ratio=0.4"}
    assert {job.number for job in missing(turned, sweep, loader)} == {1, 2, 3}


def test_a_spelling_of_the_same_sweep_is_the_same(sweep: Path, loader: ConfigLoader) -> None:
    other = jobs_of(["prune=choice(taylor,random)", "prune.ratio=choice(0.2, 0.4)"], None, loader)
    assert len(missing(other, sweep, loader)) == 3


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (
            ["prune=taylor,random", "prune.ratio=0.2,0.5"],
            ["only asked for: prune=taylor prune.ratio=0.5", "only there"],
        ),
        (["prune=taylor,random", "prune.ratio=0.2,0.4,0.6"], ["only asked for", "prune.ratio=0.6"]),
        (["prune=taylor", "prune.ratio=0.2,0.4"], ["only there: ", "prune=random"]),
        ([*TYPED, "seed=1"], ["seed=1"]),
        (["prune.ratio=0.2"], ["only there", "taylor"]),
    ],
)
def test_other_jobs_are_refused_by_name(sweep: Path, loader: ConfigLoader, typed: list[str], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        missing(jobs_of(typed, None, loader), sweep, loader)
    assert str(caught.value).startswith(f"resume={sweep}: the jobs of that sweep are others")
    assert all(part in str(caught.value) for part in named), caught.value


def test_what_is_no_sweep_is_refused(tmp_path: Path, loader: ConfigLoader) -> None:
    (tmp_path / "0").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="must be the folder of a sweep"):
            missing([("a=1",)], folder, loader)


def test_a_job_given_twice_is_two_jobs(tmp_path: Path, loader: ConfigLoader) -> None:
    typed = ["prune.ratio=0.2,0.2"]
    folder = made(tmp_path / "s", typed, jobs_of(typed, None, loader), ["ok", ""])
    assert [job.number for job in missing(jobs_of(typed, None, loader), folder, loader)] == [1]


def test_half_written_files_of_a_killed_sweep_do_not_hide_its_jobs(sweep: Path, loader: ConfigLoader) -> None:
    asked = jobs_of(TYPED, None, loader)
    (sweep / "1" / "result.json").write_text('{"status": "o')
    for half in ("- prune=rand", ""):
        (sweep / "2" / ".hydra" / "overrides.yaml").write_text(half)
        assert [job.number for job in missing(asked, sweep, loader)] == [1, 2, 3]
    (sweep / "multirun.yaml").write_text("hydra: {overr")
    assert [job.number for job in missing(asked, sweep, loader)] == [1, 3, 4], "folder 2 is of nobody knows what"


def test_files_made_to_hurt_are_unreadable_ones(sweep: Path, loader: ConfigLoader) -> None:
    """Anchors that stand for 10^9 values, nesting, bytes that are no text; the table names them all the same."""
    laughing = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    asked = jobs_of(TYPED, None, loader)
    for bad in ("\n".join(laughing).encode(), b"[" * 100_000, b"\xff\x00", b'- "prune'):
        (sweep / "2" / ".hydra" / "overrides.yaml").write_bytes(bad)
        assert [job.number for job in missing(asked, sweep, loader)] == [1, 2, 3]
        assert [row["job"] for row in sweeps.rebuild(sweep)] == [0, 1, 2]
    (sweep / "multirun.yaml").write_bytes(b"[" * 100_000)
    assert [job.number for job in missing(asked, sweep, loader)] == [1, 3, 4]


def test_only_a_whole_good_result_is_done(tmp_path: Path) -> None:
    for text in (None, "", "{", "[" * 100_000, "[]", '"ok"', '{"status": "failed"}', "{}", '{"status": "ok"}'):
        if text is not None:
            (tmp_path / "result.json").write_text(text)
        assert not is_done(tmp_path)
    (tmp_path / "result.json").write_text('{"status": "ok", "dense": {}, "pruned": {}}')
    assert is_done(tmp_path)


def test_a_sweep_goes_on_in_its_folder(forked: Command, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    line = ("-m", "prune=random", "prune.ratio=0.2,0.3", "evals=[params]", *FAST)
    # the one real sweep of this file
    assert forked(*line, f"hydra.sweep.dir={sweep}", cwd=tmp_path).returncode == 0
    before = {n: (sweep / n / "result.json").read_bytes() for n in "01"}
    plan = (sweep / "1" / "plan.json").read_bytes()
    (sweep / "1" / "result.json").unlink()
    turned = ("-m", "prune=random", "prune.ratio=0.3,0.2", "evals=[params]", *FAST)
    again = forked(*turned, f"resume={sweep}", cwd=tmp_path)
    assert again.returncode == 0 and "1 of 2 jobs are done" in again.stdout + again.stderr
    assert (sweep / "0" / "result.json").read_bytes() == before["0"] and (
        sweep / "1" / "plan.json"
    ).read_bytes() == plan
    assert [(row["status"], row["prune.ratio"]) for row in rows_of(sweep)] == [("ok", "0.2"), ("ok", "0.3")]
    nothing = forked(*line, f"resume={sweep}", cwd=tmp_path)
    assert nothing.returncode == 0 and "Launching" not in nothing.stdout + nothing.stderr
    other = forked(*line[:2], "prune.ratio=0.2,0.35", *line[3:], f"resume={sweep}", cwd=tmp_path)
    assert other.returncode == 2 and "prune.ratio=0.35" in other.stderr and "Traceback" not in other.stderr


def test_a_merge_that_another_one_does_is_left_to_it(sweep: Path, monkeypatch) -> None:
    held = Lock(sweep / sweeps.MERGING)
    held.acquire()
    refresh(sweep)
    assert not (sweep / "results.csv").exists()
    held.release()
    refresh(sweep)
    assert (sweep / "results.csv").is_file()


def test_a_result_that_comes_while_merging_is_merged_too(sweep: Path, monkeypatch) -> None:
    real, times = sweeps._rebuild, []

    def and_then_a_job_ends(folder: Path) -> list[sweeps.Row]:
        rows = real(folder)
        times.append(len(rows))
        if len(times) == 1:
            (folder / "2" / "result.json").write_text("{}")
        return rows

    monkeypatch.setattr(sweeps, "_rebuild", and_then_a_job_ends)
    refresh(sweep)
    assert len(times) == 2


def test_a_sweep_ends_well_only_if_all_jobs_did(sweep: Path, capsys) -> None:
    assert not close(sweep) and f"resume={sweep}" in capsys.readouterr().out
    assert not close(sweep / "nowhere")
    assert (sweep / "results.csv").is_file()
