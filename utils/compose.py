"""From a command line to the configurations of its jobs, with every mistake in one list.

Hydra stops at the first override it can't apply. Here the overrides are tried together
and, only if that fails, one by one, so that a user mends all of them at once.
"""

import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.check import find_problems, is_selected, resolved, suggest
from utils.composing import read_once
from utils.config import ROOT_RULES
from utils.config_files import config_file_problems, searched_folders
from utils.engines import engine_problems, searches
from utils.rules import broken_rule
from utils.secrets import COVER, redacted, why_secret, why_secret_key
from utils.targets import engine_refusals

# OmegaConf lets bare ValueErrors, AttributeErrors and AssertionErrors of odd values through
CANNOT_COMPOSE = (
    HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError, OSError,
    yaml.YAMLError, RecursionError,
)  # fmt: skip
MOST_STAND_INS = 256
MOST_JOBS = 10_000
# reading what nests takes time and stack for every level
LONGEST_OVERRIDE, MOST_NESTED = 50_000, 24
SHIPPED = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class CommandLine:
    """What decides the configuration: where it lies, and the overrides as typed.

    Attributes:
        hydra_nodes: Hydra's own part by the overrides that decide it, as far as it was composed.
    """

    config_dir: Path
    config_name: str = "config"
    overrides: list[str] = field(default_factory=list)
    extra_dir: str | None = None
    multirun: bool = False
    hydra_nodes: dict[tuple[str, ...], DictConfig | None] = field(default_factory=dict, compare=False, repr=False)


def command_line_problems(line: CommandLine) -> list[str]:
    """List every mistake of a command line over all of its jobs; an empty list means none."""
    if line.extra_dir is not None and not Path(line.extra_dir).is_dir():
        return [f"--config-dir={printable(line.extra_dir)}: must be an existing folder"]
    if not (line.config_dir / f"{line.config_name}.yaml").is_file():
        return [f"--config-name={printable(line.config_name)}: there is no such file in {line.config_dir}"]
    if secret := [said for override in line.overrides if (said := _secret(override))]:
        return secret
    if unreadable := [o for o in line.overrides if not _can_be_read(o)]:
        rule = "must be key=value; quote values with spaces or special characters: 'key=\"a value\"'"
        return [f"{printable(redacted(_short(override)))}: cannot be read; it {rule}" for override in unreadable]
    if foreign := [said for folder in _foreign_folders(line) for said in config_file_problems(folder)]:
        return foreign
    with initialize_config_dir(str(line.config_dir.absolute()), version_base="1.3"):
        read_once(_loader())
        try:
            jobs = list(_jobs(line))
            distinct = list(dict.fromkeys(override for job in jobs for override in job))
            misused = dict(_misused_groups(distinct))
        except CANNOT_COMPOSE as error:
            return [printable(redacted(_first_line(error)))]
        rest = [[override for override in job if override not in misused] for job in jobs]
        compose_job = JobComposer(line.config_name)
        found = [problem for job in rest for problem in _job_problems(line, job, compose_job)]
        engines = [] if found or misused else _engine_problems(line, rest[0], compose_job)
        called = _called_problems(line)
    return [printable(redacted(text)) for text in dict.fromkeys([*misused.values(), *found, *called, *engines])]


def _foreign_folders(line: CommandLine) -> list[Path]:
    """Folders of settings that are not the shipped ones."""
    given = [Path(line.extra_dir)] if line.extra_dir is not None else []
    given += [] if line.config_dir.resolve() == SHIPPED else [line.config_dir]
    asked = [override for override in line.overrides if "hydra.searchpath" in override]
    for override in OverridesParser.create().parse_overrides(asked):
        found = override.value()
        places = [str(place) for place in found] if isinstance(found, list) else []
        given += [Path(place.removeprefix("file://")) for place in places if not place.startswith("pkg://")]
    return given + searched_folders(line.config_dir / f"{line.config_name}.yaml")


def _secret(override: str) -> str | None:
    """Why a token or password on the command line is refused; Hydra writes overrides down as they are typed."""
    key, _, value = override.partition("=")
    why = why_secret_key(key.lstrip("+~"), value) or why_secret(value) or why_secret(key)
    return f"{redacted(key)}={COVER}: {why}" if why else None


def printable(text: str) -> str:
    """The text with characters that would steer a terminal, or can't be written, as their codes."""
    shown = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if text.isprintable() else "".join(shown)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:80]}… ({len(text)} characters)"


def _can_be_read(override: str) -> bool:
    if len(override) > LONGEST_OVERRIDE or _nested(override) > MOST_NESTED:
        return False
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):  # Python reads no number of thousands of digits
        return False
    return True


def _nested(text: str) -> int:
    """How many brackets are open at most, or parts of a key follow each other."""
    opened = itertools.accumulate((char in "[{(") - (char in ")}]") for char in text)
    return max(max(opened, default=0), text.partition("=")[0].count("."))


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _jobs(line: CommandLine) -> Iterator[list[str]]:
    """Split sweeps such as `prune.ratio=0.2,0.4` into one list of overrides a job."""
    overrides = with_extra_dir(line)
    parser = OverridesParser.create(config_loader=_loader())
    parsed = parser.parse_overrides(overrides)
    if not is_sweep(line, overrides):
        for override in parsed:
            if override.is_sweep_override():
                raise HydraException(f"{override.input_line}: several values need a sweep, with -m")
        yield overrides
        return
    if several := [o.input_line for o in parsed if o.is_hydra_override() and o.is_sweep_override()]:
        raise HydraException(f"{several[0]}: must be one value, as Hydra's own keys hold for the whole sweep")
    # what is typed takes the place of the sweep's own values, as in Hydra's sweeper
    typed = {override.get_key_element() for override in parsed}
    params = parser.parse_overrides(_sweeper_params(line, overrides))
    parsed += [override for override in params if override.get_key_element() not in typed]
    node = hydra_node(line, overrides)
    if node is not None and searches(node):
        yield from _searched(parsed)
        return
    if intervals := [override.input_line for override in parsed if override.is_interval_sweep()]:
        raise HydraException(f"{intervals[0]}: an interval needs a sweeper that searches it: hydra/sweeper=optuna")
    choices = [_choices(override) for override in parsed]
    if math.prod(map(len, choices)) > MOST_JOBS:
        raise HydraException(f"-m: the sweep has {math.prod(map(len, choices))} jobs; must have at most {MOST_JOBS}")
    yield from map(list, itertools.product(*choices))


def _searched(parsed: list[Override]) -> Iterator[list[str]]:
    """Stand-ins for the jobs of a search: all of a small space, of a large one every value and both ends once."""
    choices = [_choices(override) for override in parsed]
    for override, values in zip(parsed, choices, strict=True):
        if isinstance(sweep := override.value(), RangeSweep):
            values += [f"{override.get_key_element()}={sweep.stop}"]  # a search takes the end as well
    if math.prod(map(len, choices)) <= MOST_STAND_INS:
        yield from map(list, itertools.product(*choices))
        return
    for turn in range(max(map(len, choices))):
        yield [values[turn % len(values)] for values in choices]


def with_extra_dir(line: CommandLine) -> list[str]:
    """The overrides as typed, with `--config-dir` put first on Hydra's search path."""
    if line.extra_dir is None:
        return list(line.overrides)
    parsed = OverridesParser.create().parse_overrides([o for o in line.overrides if "hydra.searchpath" in o])
    given = [str(path) for override in parsed for path in [*override.value()]]  # type: ignore[misc]
    others = [o for o in line.overrides if "hydra.searchpath" not in o]
    everything = ",".join(f'"{path}"' for path in [f"file://{Path(line.extra_dir).absolute()}", *given])
    return [*others, f"hydra.searchpath=[{everything}]"]


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    sweep = override.value()
    ends = (sweep.start, sweep.end) if isinstance(sweep, IntervalSweep) else override.sweep_string_iterator()
    found = [f"{override.get_key_element()}={value}" for value in itertools.islice(ends, MOST_JOBS + 1)]
    if len(found) > MOST_JOBS:
        raise HydraException(f"{override.input_line}: has more than {MOST_JOBS} values; must have at most that")
    return found


def hydra_node(line: CommandLine, overrides: list[str]) -> DictConfig | None:
    """Hydra's own part of the configuration, which no job of a sweep changes; None where it can't be composed."""
    fixed = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    fixed += [o for o in overrides if o.startswith("+experiment=") and "," not in o]
    if tuple(fixed) not in line.hydra_nodes:
        line.hydra_nodes[tuple(fixed)] = _composed_hydra_node(line, fixed)
    return line.hydra_nodes[tuple(fixed)]


def _composed_hydra_node(line: CommandLine, overrides: list[str]) -> DictConfig | None:
    try:
        return compose(line.config_name, overrides, return_hydra_config=True).hydra
    except CANNOT_COMPOSE:
        return None


def is_sweep(line: CommandLine, overrides: list[str]) -> bool:
    """Whether several jobs are to be run: by `-m`, or because an experiment says so."""
    if line.multirun:
        return True
    node = hydra_node(line, overrides)
    return node is not None and str(OmegaConf.select(node, "mode")).endswith("MULTIRUN")


def _sweeper_params(line: CommandLine, overrides: list[str]) -> list[str]:
    node = hydra_node(line, overrides)
    params = OmegaConf.select(node, "sweeper.params") if node is not None else None
    return [f"{key}={value}" for key, value in params.items()] if isinstance(params, DictConfig) else []


class JobComposer:
    """Composes the jobs of a sweep; those that differ in single values alone share the rest.

    Hydra, too, first composes the chosen options and then sets dotted keys in their order.
    """

    def __init__(self, config_name: str) -> None:
        self.config_name = config_name
        self.shared: dict[tuple[str, ...], bytes] = {}

    def __call__(self, overrides: list[str]) -> DictConfig:
        """Compose one job; an open `initialize_config_dir` says from where."""
        parsed = OverridesParser.create(config_loader=_loader()).parse_overrides(overrides)
        # a whole mapping may be set between two values of its own, so that the order counts
        apart = not any(isinstance(override.value(), dict) for override in parsed)
        values = [o for o in parsed if apart and "." in o.key_or_group and not o.is_hydra_override()]
        rest = tuple(override.input_line or "" for override in parsed if override not in values)
        if rest not in self.shared:
            self.shared[rest] = pickle.dumps(compose(self.config_name, [*rest]), pickle.HIGHEST_PROTOCOL)
        cfg = pickle.loads(self.shared[rest])  # several times as fast as a deep copy
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        return cfg


def _called_problems(line: CommandLine) -> list[str]:
    """What Hydra itself would call that is none of its own kinds: launchers, callbacks, handlers of logs."""
    changed = line.extra_dir is not None or any("hydra" in override for override in line.overrides)
    if not changed and line.config_dir.resolve() == SHIPPED:
        return []
    node = hydra_node(line, with_extra_dir(line))
    # resolved, since a reference may stand for a whole node
    return list(engine_refusals(resolved(node)[0])) if node is not None else []


def _engine_problems(line: CommandLine, job: list[str], compose_job: JobComposer) -> list[str]:
    """Mistakes of what runs a sweep's jobs; a single run has none, as it uses neither launcher nor sweeper."""
    overrides = with_extra_dir(line)
    node = hydra_node(line, overrides)
    if node is None or not is_sweep(line, overrides):
        return []
    metrics = compose_job(job).evals
    return engine_problems(node, [str(name) for name in metrics if is_selected(metrics[name])])


def _job_problems(line: CommandLine, overrides: list[str], compose_job: JobComposer) -> list[str]:
    try:
        cfg = compose_job(overrides)
        return [*_ignored_additions(cfg, overrides), *find_problems(cfg, _metrics())]
    except CANNOT_COMPOSE as error:
        problems, good = _guilty(line, overrides)
        try:
            return problems + find_problems(compose(line.config_name, good), _metrics())
        except CANNOT_COMPOSE:
            return problems or [_first_line(error)]


def _metrics() -> list[str]:
    return _loader().get_group_options("evals")


def _misused_groups(overrides: list[str]) -> Iterator[tuple[str, str]]:
    """Find options such as `prune=_structural`, which only hold what others share, and lists of two methods."""
    for override in OverridesParser.create(config_loader=_loader()).parse_overrides(overrides):
        value = override.value()
        if _is_group(override) and isinstance(value, str) and value.startswith("_"):
            yield override.input_line or "", _explain_group(override, HydraException(""))
        if _is_group(override) and isinstance(value, list) and override.key_or_group != "evals":
            rule = f"{override.key_or_group} takes one option, not a list (a sweep needs -m)"
            yield override.input_line or "", f"{override.input_line}: {rule}"


def _ignored_additions(cfg: DictConfig, overrides: list[str]) -> Iterator[str]:
    """Find `+evals=x` beside `evals=[...]`, which Hydra leaves out without a word."""
    added = [override for override in overrides if override.startswith("+")]
    for override in OverridesParser.create(config_loader=_loader()).parse_overrides(added):
        group, name = override.key_or_group, override.value()
        if _is_group(override) and group != "experiment" and isinstance(name, str):
            node = OmegaConf.select(cfg, group)
            if OmegaConf.is_dict(node) and "_target_" not in node and name not in node:
                everything = ",".join([*map(str, node), name])
                yield f"{override.input_line}: has no effect beside {group}=[...]; write {group}=[{everything}]"


def _guilty(line: CommandLine, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Try overrides one by one on top of the good ones; return the problems and the good."""
    parsed = OverridesParser.create(config_loader=_loader()).parse_overrides(overrides)
    # where options are found decides what is one; groups decide which keys there are
    order = sorted(parsed, key=lambda o: (not o.is_hydra_override(), not _is_group(o)))
    problems, good = [], []
    for override in order:
        text = override.input_line or ""
        try:
            compose(line.config_name, [*good, text])
            good.append(text)
        except CANNOT_COMPOSE as error:
            problems.append(_explain(line, good, override, error))
    return problems, good


def _is_group(override: Override) -> bool:
    return _loader().get_group_options(override.key_or_group) != []


def _explain(line: CommandLine, good: list[str], override: Override, error: Exception) -> str:
    text, key = override.input_line, override.key_or_group
    if _is_group(override):
        return _explain_group(override, error)
    if key in ROOT_RULES and (broken := broken_rule(override.value(), ROOT_RULES[key])):
        return f"{text}: {broken}"
    cfg = compose(line.config_name, good, return_hydra_config=True)
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent = OmegaConf.select(cfg, ".".join(parts[:depth])) if depth else cfg
        if not OmegaConf.is_dict(parent):
            return f"{text}: {'.'.join(parts[:depth])} is a single value and has no {part!r}"
        if part not in parent and override.type is not OverrideType.ADD:
            choice = cfg.hydra.runtime.choices.get(".".join(parts[:depth]))
            return f"{text}: {_no_such_key('.'.join(parts[:depth]), part, parent, choice)}"
    return f"{text}: {_first_line(error)}"


def _no_such_key(path: str, part: str, parent: DictConfig, choice: str | None) -> str:
    options = [o for o in _loader().get_group_options(path) if not o.startswith("_")]
    if path and part in options:
        selected = ",".join([*map(str, parent), part])
        return f"{part} is not among the selected {path}; select it: {path}=[{selected}]"
    keys = [str(key) for key in parent if not str(key).startswith("_") and key != "hydra"]
    owner = f"{path}={choice}" if isinstance(choice, str) else path or "the configuration"
    if not keys:
        return f"{owner} takes no {part!r} and no other key"
    return f"{owner} has no key {part!r}; {suggest(part, keys)}"


def _explain_group(override: Override, error: Exception) -> str:
    group, text = override.key_or_group, override.input_line
    options = [o for o in _loader().get_group_options(group) if not o.startswith("_")]
    value = override.value()
    asked = [str(v) for v in (value if isinstance(value, list) else [value])]
    unknown = [name for name in asked if not _is_option(group, name)]
    if group == "experiment" and override.type is OverrideType.CHANGE and not unknown:
        return f"{text}: an experiment is added with a plus: +{text}"
    if unknown:
        return f"{text}: {group} has no option {', '.join(map(repr, unknown))}; {suggest(unknown[0], options)}"
    return f"{text}: {_first_line(error)}"


def _is_option(group: str, name: str) -> bool:
    return not name.startswith("_") and name in _loader().get_group_options(group, ObjectType.CONFIG)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    return f"{lines[0]} ({cause})" if cause and cause not in lines[0] else lines[0]
