"""The jobs of a sweep as lists of overrides, on the command line and in a sweep's folder, and how they match."""

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.config_files import why_too_large
from utils.errors import InputError

SWEEP_FILE = "multirun.yaml"
MOST_SHOWN = 4

Job = tuple[str, ...]
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, YAMLError, HydraException, OmegaConfBaseException)


@dataclass(frozen=True)
class Numbered:
    """A job and the folder of the sweep that belongs to it."""

    number: int
    overrides: Job


def jobs_of(overrides: Sequence[str], params: Mapping[str, str] | None, loader: ConfigLoader) -> list[Job]:
    """The jobs that Hydra makes of a sweep's overrides, in its order.

    Args:
        overrides: As typed; values of a sweep such as `prune.ratio=0.2,0.4` among them.
        params: The sweeper's own, which typed ones replace.
        loader: Knows the options of groups, for `+experiment=glob(*)`.
    """
    own = [f"{key}={value}" for key, value in (params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*own, *overrides])
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return [tuple(job) for job in batch]


def job_folders(sweep: Path) -> list[Path]:
    """The folders of the jobs that started, by their numbers."""
    found = (path for path in sweep.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def is_done(job: Path) -> bool:
    """Whether a job left a whole result that says `ok`."""
    try:
        found = json.loads((job / "result.json").read_bytes())
        return found["status"] == "ok" and {"dense", "pruned"} <= found.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def started_jobs(sweep: Path, loader: ConfigLoader) -> list[Numbered]:
    """The jobs that have a folder and say what they were given."""
    found = []
    for folder in job_folders(sweep):
        if (given := given_to(folder)) is None:
            continue  # killed while it wrote them: the sweep's own file knows
        try:
            (job,) = jobs_of(given, None, loader)
        except UNREADABLE:
            continue
        found.append(Numbered(int(folder.name), job))
    return found


def given_to(job: Path) -> list[str] | None:
    """The overrides that a job's folder says it was given; None where that can't be read."""
    try:
        given = _loaded(job / ".hydra" / "overrides.yaml")
    except UNREADABLE:
        return None
    return [str(line) for line in given] if OmegaConf.is_list(given) else None


def _loaded(path: Path) -> Any:
    """A YAML file of a sweep.

    Raises:
        ValueError: If it stands for too much, or is no text.
    """
    text = path.read_text(encoding="utf-8")
    if why := why_too_large(text):
        raise ValueError(f"{path}: {why}")
    return OmegaConf.create(text)


def typed_for(sweep: Path) -> tuple[list[str], dict[str, str]] | None:
    """The overrides that a sweep was started with, and its sweeper's own; None where its file can't be read."""
    try:
        hydra = _loaded(sweep / SWEEP_FILE).hydra
        params = hydra.sweeper.get("params") or {}
        return [str(line) for line in hydra.overrides.task], {str(k): str(v) for k, v in params.items()}
    except UNREADABLE:
        return None


def all_jobs(sweep: Path, loader: ConfigLoader) -> list[Numbered] | None:
    """Every job of a sweep, also those that never started; None if it can't be known.

    Raises:
        InputError: If the folder is none of a sweep.
    """
    if not sweep.is_dir():
        raise InputError(f"resume={sweep}: must be the folder of a sweep; there is no such folder")
    started = started_jobs(sweep, loader)
    typed = typed_for(sweep)
    if typed is None and not started:
        raise InputError(f"resume={sweep}: must be the folder of a sweep; it holds no {SWEEP_FILE} and no jobs")
    try:
        planned = None if typed is None else jobs_of(*typed, loader)
    except UNREADABLE:
        planned = None
    if planned is None:
        return None
    # a job that was killed while it wrote down what it was given is known from the sweep's file
    return [Numbered(number, job) for number, job in enumerate(planned)]


def matched(asked: Iterable[Job], sweep: Path, loader: ConfigLoader) -> list[Numbered]:
    """Give the jobs of a command line the numbers that they have in a sweep's folder.

    Jobs are the same if their overrides are, in whatever order.

    Raises:
        InputError: If the folder is none of a sweep, or its jobs are others.
    """
    there, jobs = all_jobs(sweep, loader), list(asked)
    complete = there is not None
    numbers = defaultdict(list)
    for job in started_jobs(sweep, loader) if there is None else there:
        numbers[frozenset(job.overrides)].append(job.number)
    found, new = [], []
    for job in jobs:
        known = numbers[frozenset(job)]
        (found if known else new).append(Numbered(known.pop(0) if known else -1, job))
    surplus = [sorted(key) for key, left in numbers.items() for _ in left]
    if surplus or (new and complete):
        shared = set.intersection(*map(set, jobs), *map(set, numbers))
        strangers = [job.overrides for job in new] if complete else []
        raise InputError(differences(sweep, strangers, surplus, shared))
    taken = {job.number for job in found} | {int(folder.name) for folder in job_folders(sweep)}
    free = (number for number in range(len(jobs) + len(taken)) if number not in taken)
    found += [Numbered(next(free), job.overrides) for job in new]
    return sorted(found, key=lambda job: job.number)


def missing(asked: Iterable[Job], sweep: Path, loader: ConfigLoader) -> list[Numbered]:
    """The jobs of a command line that have no good result in a sweep's folder.

    Raises:
        InputError: If the folder is none of a sweep, or its jobs are others.
    """
    return [job for job in matched(asked, sweep, loader) if not is_done(sweep / str(job.number))]


def differences(
    sweep: Path, new: Sequence[Sequence[str]], surplus: Sequence[Sequence[str]], shared: Container[str] = ()
) -> str:
    """What two sets of jobs do not share, in one message.

    Args:
        sweep: The folder that holds some of them.
        new: Jobs that it does not hold.
        surplus: Jobs that only it holds.
        shared: Overrides that all jobs have, which tell nothing.
    """

    def shown(jobs: Sequence[Sequence[str]]) -> str:
        texts = [" ".join(part for part in job if part not in shared) or "(no overrides)" for job in jobs]
        more = f" and {len(texts) - MOST_SHOWN} more" if len(texts) > MOST_SHOWN else ""
        return "; ".join(texts[:MOST_SHOWN]) + more

    parts = [f"only asked for: {shown(new)}"] if new else []
    parts += [f"only there: {shown(surplus)}"] if surplus else []
    return (
        f"resume={sweep}: the jobs of that sweep are others ({' | '.join(parts)}); give the command it was started with"
    )
