"""A sweep on the command line: where its folder is, what of it is still to do, and how it ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.compose import CommandLine, hydra_node, is_sweep, with_extra_dir
from utils.deferred import deferred
from utils.engines import engine_environment, searches
from utils.errors import InputError
from utils.files import why_not_writable
from utils.from_python import written
from utils.jobs import differences, jobs_of, missing, typed_for

RESUME = "resume="
IN_PROCESS = "hydra._internal.core_plugins.basic_launcher."


@dataclass(frozen=True)
class Sweep:
    """A sweep that is about to start.

    Attributes:
        folder: Where it leaves its files, absolute, so that a job may run anywhere.
        overrides: What Hydra is told beyond what was typed.
        left: How many jobs are to be done; None where only the sweeper knows.
        environment: Variables that its launcher needs.
        deferred: What Hydra is told instead of settings that wait for their jobs, by what was typed.
        in_process: Whether jobs run one after the other in this process.
    """

    folder: Path
    overrides: list[str]
    left: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    deferred: Mapping[str, str] = field(default_factory=dict)
    in_process: bool = False

    def told(self, arguments: Sequence[str]) -> list[str]:
        """The command line as Hydra is to read it."""
        return with_overrides([self.deferred.get(argument, argument) for argument in arguments], self.overrides)


def take_resume(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Part `resume=<sweep folder>` from a command line; Hydra never sees it.

    Raises:
        InputError: If it is given twice, or without a folder.
    """
    given = [argument for argument in arguments if argument.lstrip("+").startswith(RESUME)]
    if len(given) > 1:
        raise InputError(f"{' '.join(given)}: one sweep at a time is resumed")
    if not given:
        return list(arguments), None
    value = given[0].partition("=")[2].strip("'\"")
    if not value:
        raise InputError(f"{RESUME}: must be the folder of a sweep, multirun/<date>/<time>")
    return [argument for argument in arguments if argument != given[0]], Path(value)


def with_overrides(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """Put overrides behind the last one of a command line, since options may follow it."""
    typed = get_args_parser().parse_args(list(arguments)).overrides
    last = max((at for at, argument in enumerate(arguments) if argument in typed), default=len(arguments) - 1)
    return [*arguments[: last + 1], *more, *arguments[last + 1 :]]


def prepared(line: CommandLine, resume: Path | None) -> Sweep | None:
    """What a right command line asks for, if it is a sweep; None: a single run.

    Args:
        line: Without mistakes.
        resume: Folder of the sweep that is to go on.

    Raises:
        InputError: If that folder can't be gone on with.
    """
    with initialize_config_dir(str(line.config_dir.absolute()), version_base="1.3"):
        overrides = with_extra_dir(line)
        if not is_sweep(line, overrides):
            if resume is not None:
                raise InputError(f"{RESUME}{resume}: goes on with a sweep, which needs -m")
            if (node := hydra_node(line, overrides)) is not None:
                _refuse_unwritable("hydra.run.dir", _place(node, "run.dir"))
            return None
        hydra = hydra_node(line, overrides)
        assert hydra is not None
        folder = _place(hydra, "sweep.dir") if resume is None else resume.absolute()
        place = f"hydra.sweep.dir={written('hydra.sweep.dir', str(folder))}"
        _refuse_unwritable("hydra.sweep.dir" if resume is None else "resume", folder)
        sweep = Sweep(
            folder, [place], environment=engine_environment(hydra), deferred=_deferred(line, overrides, hydra),
            in_process=str(hydra.launcher._target_).startswith(IN_PROCESS),
        )  # fmt: skip
        if resume is None:
            return sweep
        told = replace(line, overrides=[sweep.deferred.get(override, override) for override in line.overrides])
        if searches(hydra):
            _refuse_another_search(told.overrides, resume)
            return sweep
        return replace(sweep, overrides=[place, "hydra/sweeper=resume"], left=_count_missing(told, hydra, resume))


def _place(hydra: DictConfig, key: str) -> Path:
    """A folder that Hydra's part of the configuration names.

    Raises:
        InputError: If it is missing, or a reference in it leads nowhere.
    """
    try:
        return Path(str(OmegaConf.select(hydra, key, throw_on_missing=True))).absolute()
    except OmegaConfBaseException as error:
        raise InputError(f"hydra.{key}: must be a folder ({str(error).splitlines()[0]})") from error


def _refuse_unwritable(key: str, folder: Path) -> None:
    """A place that nothing can be left in is found before any work."""
    if why := why_not_writable(folder):
        raise InputError(f"{key}={folder}: cannot be written ({why}); must be a folder that can")


def _deferred(line: CommandLine, overrides: Sequence[str], hydra: DictConfig) -> dict[str, str]:
    own = [f"{key}={value}" for key, value in _params(hydra).items()]
    return deferred([*own, *overrides], line.config_name, GlobalHydra.instance().config_loader())


def _params(hydra: DictConfig) -> dict[str, str]:
    return {str(key): str(value) for key, value in (hydra.sweeper.get("params") or {}).items()}


def _count_missing(line: CommandLine, hydra: DictConfig, resume: Path) -> int:
    loader = GlobalHydra.instance().config_loader()
    return len(missing(jobs_of(_task_overrides(line.overrides), _params(hydra), loader), resume, loader))


def _task_overrides(overrides: Sequence[str]) -> list[str]:
    """What is said of the jobs; the rest is said of Hydra."""
    return [override for override in overrides if not override.lstrip("+~").startswith(("hydra.", "hydra/"))]


def _refuse_another_search(overrides: Sequence[str], resume: Path) -> None:
    """A search has no list of jobs: its space must be the same."""
    typed = typed_for(resume)
    if typed is None:
        raise InputError(f"{RESUME}{resume}: must be the folder of a sweep, with its multirun.yaml")
    asked, there = set(_task_overrides(overrides)), set(typed[0])
    if asked != there:
        one = [[part] for part in sorted(asked - there)], [[part] for part in sorted(there - asked)]
        raise InputError(differences(resume, *one))
