"""Launchers and sweepers: what is checked before job 0, and four jobs through each for real (slow)."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from tests.conftest import CONFIGS, SMALL
from tests.test_cli import ROOT, call
from tests.test_config import problems
from tests.test_sweep import rows_of
from utils import engines
from utils.compose import hydra_node
from utils.engines import EXTRAS, engine_environment, engine_problems, reach_workers
from utils.errors import InputError
from utils.sweeping import prepared, take_resume, with_overrides

FAST = [s for s in SMALL if not s.startswith("evals.")]
LAUNCHERS = ("joblib", "ray", "submitit_local", "submitit_slurm")
SEARCH = ("-m", "hydra/sweeper=optuna", "prune.ratio=interval(0.1,0.5)")


@pytest.fixture
def installed(monkeypatch) -> None:
    """As if every extra were there."""
    monkeypatch.setattr(engines, "_version", lambda package: "1.4.54")


@pytest.fixture
def nothing(monkeypatch) -> None:
    """As if no extra were there."""
    monkeypatch.setattr(engines, "_version", lambda package: None)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_composes_and_checks(launcher: str, installed) -> None:
    assert problems("-m", f"hydra/launcher={launcher}", "prune.ratio=0.2,0.4") == []
    found = problems("-m", f"hydra/launcher={launcher}", "prune.ratio=0.2,1.5", "prune=fisher,random")
    assert found == ["prune.ratio=1.5: must be in [0, 1)"], "every job is checked"


@pytest.mark.parametrize("arguments", [*((f"hydra/launcher={name}",) for name in LAUNCHERS), SEARCH[1:]])
def test_a_missing_extra_is_one_line_with_its_command(arguments: tuple[str, ...], nothing) -> None:
    (found,) = problems("-m", *arguments)
    assert found.startswith(arguments[0]) and "\n" not in found
    file = found.rpartition("pip install -r ")[2]
    pins = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] not in "#-"]
    assert pins and all("==" in pin for pin in pins), "exact pins"
    packages = next(names for extra, names in EXTRAS.values() if file == f"requirements-{extra}.txt")
    assert all(any(pin.split("==")[0].split("[")[0] == name for pin in pins) for name in packages)


def test_a_single_run_needs_no_launcher(nothing) -> None:
    assert problems("hydra/launcher=joblib") == []


def test_a_sqlalchemy_that_is_too_new_is_named(monkeypatch) -> None:
    monkeypatch.setattr(engines, "_version", lambda package: "2.1.0")
    (found,) = problems(*SEARCH)
    assert "sqlalchemy below 2, found 2.1.0" in found and "requirements-optuna.txt" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=0"), "hydra.launcher.n_jobs=0: must be at least 1, or -1"),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=two"), "hydra.launcher.n_jobs=two: must be a whole number"),
        (("hydra/launcher=joblib", "hydra.launcher.jobs=2"), "hydra.launcher has no key 'jobs'; did you mean"),
        (("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=0"), "timeout_min=0: must be at least 1"),
        (("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=0"), "num_cpus=0: must be at least 1"),
        (
            ("hydra/launcher=ray", "hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.init.num_cpus=2"),
            "hydra.launcher.ray.init.num_cpus=2: with address=auto it must be null",
        ),
        (("hydra/launcher=jobli",), "did you mean 'joblib'?"),
        (("prune.ratio=interval(0.1,0.5)",), "an interval needs a sweeper that searches it: hydra/sweeper=optuna"),
        ((*SEARCH[1:], "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials=0: must be at least 1"),
        ((*SEARCH[1:], "hydra.sweeper.direction=[up,down]"), "direction=['up', 'down']: each entry must be one of"),
        ((*SEARCH[1:], "hydra.sweeper.direction=[minimize]"), "must have 2 entries, one for each"),
        ((*SEARCH[1:], "hydra.sweeper.objectives=[accuracy,size]", "evals=[accuracy]"), "'size' is not among the"),
        ((*SEARCH[1:], "evals=[quality,latency]"), "'macs' is not among the selected evals"),
        (("hydra/sweeper=optuna", "prune.ratio=interval(0.1,1.5)"), "prune.ratio=1.5: must be in [0, 1)"),
        (("hydra/sweeper=optuna", "prune.ratio=range(0.1,1,0.1)"), "prune.ratio=1: must be in [0, 1)"),
        (("hydra/sweeper=optuna", "prune=choice(fisher,fischer)"), "did you mean 'fisher'?"),
    ],
)
def test_mistakes_are_found_before_job_0(arguments: tuple[str, ...], message: str, installed) -> None:
    found = problems("-m", *arguments)
    assert any(message in line for line in found), found


@pytest.mark.slow
def test_a_large_space_is_checked_value_by_value(installed) -> None:
    space = ("prune.ratio=range(0.01,0.9,0.01)", "seed=range(0,100)", "prune=choice(fisher,random)")
    assert problems("-m", "hydra/sweeper=optuna", *space) == []


def test_resume_is_taken_from_the_line_and_overrides_stand_together() -> None:
    assert take_resume(["-m", "a=1", "resume='x y'"]) == (["-m", "a=1"], Path("x y"))
    assert take_resume(["a=1"]) == (["a=1"], None)
    assert with_overrides(["-m", "a=1", "--config-dir", "d"], ["b=2"]) == ["-m", "a=1", "b=2", "--config-dir", "d"]
    assert with_overrides(["-m"], ["b=2"]) == ["-m", "b=2"]
    for wrong in (["resume="], ["resume=a", "resume=b"]):
        with pytest.raises(InputError, match="resume="):
            take_resume(wrong)


def test_workers_find_the_project(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/other")
    seen: dict[str, str] = {}
    reach_workers(ROOT, seen.__setitem__)
    assert seen == {"PYTHONPATH": f"{ROOT}{os.pathsep}/other"}
    monkeypatch.setenv("PYTHONPATH", f"/other{os.pathsep}{ROOT}")
    seen.clear()
    reach_workers(ROOT, seen.__setitem__)
    assert seen == {}


def test_a_token_is_shown_to_a_cluster_that_is_joined(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hydra = OmegaConf.create({"launcher": {"ray": {"init": {"address": "10.0.0.1:6379"}}}})
    assert engine_environment(hydra, {}) == {}, "there is no token"
    shown = {"RAY_AUTH_MODE": "token"}
    assert engine_environment(hydra, {"RAY_AUTH_TOKEN_PATH": "/x"}) == shown
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    assert engine_environment(hydra, {}) == shown and engine_environment(hydra, {"RAY_AUTH_MODE": "disabled"}) == {}
    for address in (None, "local"):
        hydra.launcher.ray.init.address = address
        assert engine_environment(hydra, {}) == {}
    assert engine_environment(OmegaConf.create({"launcher": {"n_jobs": 2}}), {}) == {}


def test_only_a_sweep_without_workers_leaves_at_once(installed) -> None:
    from utils.cli import parse_command_line

    for launcher, in_process in (("basic", True), ("joblib", False), ("submitit_local", False), ("ray", False)):
        line = parse_command_line(["-m", f"hydra/launcher={launcher}"], CONFIGS)
        assert line and (sweep := prepared(line, None)) and sweep.in_process == in_process, launcher


def test_a_sweep_knows_its_folder_before_it_starts(tmp_path: Path, monkeypatch) -> None:
    from utils.cli import parse_command_line

    monkeypatch.chdir(tmp_path)
    line = parse_command_line(["-m", "prune.ratio=0.1,0.2", "hydra.sweep.dir='a b'"], CONFIGS)
    assert line
    sweep = prepared(line, None)
    assert sweep and sweep.folder == tmp_path / "a b" and sweep.overrides == [f"hydra.sweep.dir='{tmp_path}/a b'"]
    dated = parse_command_line(["-m"], CONFIGS)
    assert dated and (found := prepared(dated, None)) and found.folder.parent.parent == tmp_path / "multirun"
    single = parse_command_line([], CONFIGS)
    assert single and prepared(single, None) is None
    with pytest.raises(InputError, match="needs -m"):
        prepared(single, tmp_path)


def test_the_engines_settings_are_the_plugins_own(installed) -> None:
    """Keys that a plugin of these versions takes; a key it does not know would end a sweep late."""
    line = __import__("utils.cli", fromlist=["x"]).parse_command_line(["-m", "hydra/sweeper=optuna"], CONFIGS)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = hydra_node(line, line.overrides)
    assert hydra is not None and list(hydra.sweeper.direction) == ["maximize", "minimize"]
    assert hydra.sweeper.storage.endswith("/study.db") and hydra.sweeper.sampler._target_.endswith("TPESampler")
    assert engine_problems(hydra, ["accuracy", "macs"]) == []
    assert OmegaConf.select(hydra, "sweeper.sampler.seed") == 0


def needs(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


GRID = ("prune=taylor,random", "prune.ratio=0.2,0.3")
ENGINES = {
    "joblib": (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("joblib", "hydra_plugins.hydra_joblib_launcher")),
    "ray": (
        ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", "hydra.launcher.ray.init.include_dashboard=false"),
        ("ray", "hydra_plugins.hydra_ray_launcher"),
    ),
    "submitit_local": (("hydra/launcher=submitit_local",), ("submitit", "hydra_plugins.hydra_submitit_launcher")),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_jobs_for_real(engine: str, tmp_path: Path) -> None:
    needs("hydra_plugins")
    arguments, modules = ENGINES[engine]
    needs(*modules)
    sweep, evals = tmp_path / "sweep", "evals=[accuracy,macs]"
    line = ("-m", *GRID, evals, *FAST, *arguments, f"hydra.sweep.dir={sweep}")
    done = call(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(sweep)
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [(row["prune"], row["prune.ratio"]) for row in rows] == [
        ("taylor", "0.2"), ("taylor", "0.3"), ("random", "0.2"), ("random", "0.3"),
    ]  # fmt: skip
    hits = [row["cache_hit"] for row in rows]
    assert sorted(hits[:2]) == sorted(hits[2:]) == ["False", "True"], "each method was ranked once"
    assert (sweep / "report.html").is_file() and (sweep / "pareto.png").is_file()
    # one result lost, one failed: only these are done again
    (sweep / "1" / "result.json").unlink()
    failed = json.loads((sweep / "2" / "result.json").read_text()) | {"status": "failed"}
    (sweep / "2" / "result.json").write_text(json.dumps(failed))
    untouched = {n: (sweep / n / "result.json").stat().st_mtime_ns for n in ("0", "3")}
    again = call(*line, f"resume={sweep}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in rows_of(sweep)] == ["ok"] * 4
    assert untouched == {n: (sweep / n / "result.json").stat().st_mtime_ns for n in ("0", "3")}


@pytest.mark.slow
def test_an_optuna_search_for_real(tmp_path: Path) -> None:
    needs("optuna", "hydra_plugins", "hydra_plugins.hydra_optuna_sweeper")
    sweep = tmp_path / "sweep"
    line = (*SEARCH, "hydra.sweeper.n_trials=4", "prune=random", "evals=[accuracy,macs]", *FAST)
    assert call(*line, f"hydra.sweep.dir={sweep}", cwd=tmp_path).returncode == 0
    assert [row["status"] for row in rows_of(sweep)] == ["ok"] * 4
    solutions = OmegaConf.load(sweep / "optimization_results.yaml").solutions
    figures = {(float(r["pruned_accuracy"]), float(r["pruned_macs"])) for r in rows_of(sweep)}
    assert {tuple(s["values"]) for s in solutions} <= figures
    best = max(figures)
    assert best in {tuple(s["values"]) for s in solutions}, "accuracy goes up"
    shutil.rmtree(sweep / "2")
    (sweep / "1" / "result.json").unlink()
    more = [part if part != "hydra.sweeper.n_trials=4" else "hydra.sweeper.n_trials=5" for part in line]
    assert call(*more, f"resume={sweep}", cwd=tmp_path).returncode == 0
    rows = rows_of(sweep)
    assert [row["status"] for row in rows] == ["ok"] * 5 and len({row["prune.ratio"] for row in rows}) == 5
