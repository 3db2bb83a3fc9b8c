"""What runs the jobs of a sweep: is it installed, is it set right, and what do its processes need.

Launchers and sweepers are Hydra's plugins; each is an extra. Nothing here imports one.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from utils.check import suggest
from utils.rules import Count, NonNegative, Positive, Range, Whole, broken_rule
from utils.starter import starter

# the packages that a plugin or a sweeper's target stands for, and the requirements file that installs them
EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "hydra_plugins.hydra_joblib_launcher.": ("joblib", ("hydra-joblib-launcher", "joblib")),
    "hydra_plugins.pare.cluster.": ("ray", ("hydra-ray-launcher", "ray")),
    "hydra_plugins.hydra_submitit_launcher.": ("submitit", ("hydra-submitit-launcher", "submitit")),
    "hydra_plugins.pare.local_jobs.": ("submitit", ("hydra-submitit-launcher", "submitit")),
    "hydra_plugins.pare.search.": ("optuna", ("hydra-optuna-sweeper", "optuna", "sqlalchemy")),
}
ENDS_WITH_STARTER = ("hydra_plugins.hydra_joblib_launcher.", "hydra_plugins.pare.local_jobs.")
Workers = Annotated[int, Range(-1)]
RULES: Mapping[str, Any] = {
    "launcher.n_jobs": Workers,
    "launcher.timeout_min": Count,
    "launcher.cpus_per_task": Count,
    "launcher.gpus_per_node": Whole,
    "launcher.tasks_per_node": Literal[1],
    "launcher.nodes": Literal[1],
    "launcher.mem_gb": Positive,
    "launcher.array_parallelism": Count,
    "launcher.max_num_timeout": Whole,
    "launcher.ray.init.address": str,
    "launcher.ray.init.num_cpus": Count,
    "launcher.ray.init.num_gpus": Whole,
    "launcher.ray.remote.num_cpus": NonNegative,
    "launcher.ray.remote.num_gpus": NonNegative,
    "sweeper.max_batch_size": Count,
    "sweeper.n_trials": Count,
    "sweeper.n_jobs": Count,
    "sweeper.max_failure_rate": Annotated[float, Range(0, 1)],
    "sweeper.objectives": list[str],
    "sweeper.direction": list[Literal["minimize", "maximize"]],
}
# keys for which null stands for the engine's own choice
OPTIONAL = (
    "launcher.cpus_per_task",
    "launcher.gpus_per_node",
    "launcher.mem_gb",
    "launcher.ray.init.address",
    "launcher.ray.init.num_cpus",
    "launcher.ray.init.num_gpus",
    "launcher.ray.remote.num_cpus",
    "launcher.ray.remote.num_gpus",
    "sweeper.max_batch_size",
)  # fmt: skip
TOO_NEW_SQLALCHEMY = 2
JOB_FOLDER = "${hydra.job.num}"
# figures that are never a task's own
NO_QUALITY = ("macs", "params", "nonzero_params", "size", "latency", "throughput", "peak_memory", "energy")


OPTIONS = Path(__file__).parent.parent / "hydra_plugins" / "pare"


def register_options(folder: Path) -> None:
    """Offer this project's settings of launchers and sweepers, also of plugins that are not installed.

    They can't be files on Hydra's search path: it would hold one against a plugin's own option of the same name.
    """
    Plugins.instance()  # plugins store theirs when they are found; the last one counts
    for path in sorted(folder.glob("hydra/**/*.yaml")):
        group = path.parent.relative_to(folder).as_posix()
        ConfigStore.instance().store(group=group, name=path.stem, node=OmegaConf.load(path), provider="pare")


register_options(OPTIONS)


def searches(hydra: DictConfig) -> bool:
    """Whether the sweeper chooses jobs by what earlier ones gave, so that they can't be listed ahead."""
    return OmegaConf.select(hydra, "sweeper.objectives") is not None


def engine_problems(hydra: DictConfig, metrics: Sequence[str]) -> list[str]:
    """List what keeps a sweep's launcher and sweeper from working; an empty list means nothing.

    Args:
        hydra: Hydra's own part of the configuration.
        metrics: Names of the selected metrics.
    """
    chosen = OmegaConf.to_container(hydra.runtime.choices)
    assert isinstance(chosen, dict)
    found = []
    for part in ("launcher", "sweeper"):
        target = str(OmegaConf.select(hydra, f"{part}._target_"))
        found += _not_installed(f"hydra/{part}={chosen.get(f'hydra/{part}')}", target)
    return (
        found
        + list(_broken_rules(hydra))
        + list(_not_of_a_joined(hydra))
        + list(_misplaced_jobs(hydra))
        + (_search_problems(hydra, metrics) if searches(hydra) else [])
    )


def _not_installed(choice: str, target: str) -> list[str]:
    for prefix, (name, packages) in EXTRAS.items():
        if target.startswith(prefix):
            absent = [package for package in packages if _version(package) is None]
            command = f"pip install -r requirements-{name}.txt"
            if absent:
                return [f"{choice}: needs {', '.join(absent)}; install with: {command}"]
            if "sqlalchemy" in packages and int((_version("sqlalchemy") or "0").split(".")[0]) >= TOO_NEW_SQLALCHEMY:
                return [f"{choice}: needs sqlalchemy below 2, found {_version('sqlalchemy')}; install with: {command}"]
    return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _broken_rules(hydra: DictConfig) -> Iterator[str]:
    for key, rule in RULES.items():
        if (node := OmegaConf.select(hydra, key.rpartition(".")[0])) is None or key.rpartition(".")[2] not in node:
            continue
        value = OmegaConf.select(hydra, key)
        if value is None and key in OPTIONAL:
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if broken := broken_rule(plain, rule):
            yield f"hydra.{key}={plain}: {broken}"
    if OmegaConf.select(hydra, "launcher.n_jobs") == 0:
        yield "hydra.launcher.n_jobs=0: must be at least 1, or -1 for one a core"


def _misplaced_jobs(hydra: DictConfig) -> Iterator[str]:
    """Folders of jobs that the sweep's table and `resume=` would not find, or that lie outside of the sweep's own."""
    written = OmegaConf.to_container(hydra.sweep, resolve=False)
    if isinstance(written, dict) and (subdir := written["subdir"]) != JOB_FOLDER:
        yield f"hydra.sweep.subdir={subdir}: must be {JOB_FOLDER}, the number by which a sweep's table finds its jobs"


def _joined_cluster(hydra: DictConfig) -> str | None:
    """The address of the Ray cluster that a sweep joins; None where it starts one, or none is asked for."""
    address = OmegaConf.select(hydra, "launcher.ray.init.address")
    return None if address in (None, "local") else str(address)


def _not_of_a_joined(hydra: DictConfig) -> Iterator[str]:
    """Sizes that a running cluster has already."""
    if (address := _joined_cluster(hydra)) is None:
        return
    for name in ("num_cpus", "num_gpus", "object_store_memory"):
        value = OmegaConf.select(hydra, f"launcher.ray.init.{name}")
        if value is not None:
            rule = "must be null, as a running cluster has its own; `ray start` sets it"
            yield f"hydra.launcher.ray.init.{name}={value}: with address={address} it {rule}"


def engine_environment(hydra: DictConfig, known: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that a launcher needs and nobody has set.

    Processes of joblib and submitit_local go on by themselves where the one that started them is killed: they are told
    which one it is. Ray sees to that itself, and jobs of Slurm are to go on.

    `ray start` asks for a token where there is one on its machine (a cluster that a sweep started has left it), but
    Ray shows it by itself only to a cluster that it found itself, and not to one by address.
    """
    if str(OmegaConf.select(hydra, "launcher._target_")).startswith(ENDS_WITH_STARTER):
        return starter()
    if _joined_cluster(hydra) is None or "RAY_AUTH_MODE" in known:
        return {}
    given = any(name in known for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    there = given or Path("~/.ray/auth_token").expanduser().is_file()
    return {"RAY_AUTH_MODE": "token"} if there else {}


def _search_problems(hydra: DictConfig, metrics: Sequence[str]) -> list[str]:
    """Objectives that nothing measures, or without a direction each."""
    objectives, directions = list(hydra.sweeper.objectives), hydra.sweeper.direction
    if not objectives:
        return ["hydra.sweeper.objectives=[]: must name at least one metric"]
    found = []
    if OmegaConf.is_list(directions) and len(directions) != len(objectives):
        rule = f"must have {len(objectives)} entries, one for each of hydra.sweeper.objectives"
        found.append(f"hydra.sweeper.direction={list(directions)}: {rule}")
    for name in objectives:
        if not _is_measured(str(name), metrics):
            found.append(
                f"hydra.sweeper.objectives: {name!r} is not among the selected evals; {suggest(name, metrics)}"
            )
    return found


def _is_measured(name: str, metrics: Sequence[str]) -> bool:
    """Whether a figure may come of the metrics: `quality` gives a task's own, others put their name in front."""
    of_a_task = "quality" in metrics and name not in NO_QUALITY
    return of_a_task or any(name.startswith(metric) for metric in metrics)


def reach_workers(root: Path, setenv: Callable[[str, str], object] = os.environ.__setitem__) -> None:
    """Let processes that a launcher starts import this project, wherever they start."""
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if str(root) not in known:
        setenv("PYTHONPATH", os.pathsep.join([str(root), *known]))
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
