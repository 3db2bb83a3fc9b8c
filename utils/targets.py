"""What a `_target_` may be: a component of its group, of this project or of anybody's own module.

Configurations are data. Calling whatever they name would make every callable of Python and of the installed
libraries a command, so that a target is looked at in its source before anything is imported.
"""

import ast
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.signature import (
    FUNCTIONS,
    Module,
    TargetError,
    definition_of,
    find_module,
    methods_of,
    read_signature,
    returned,
)

PROJECT = Path(__file__).parent.parent
OWN = ("models", "data", "prune", "evals", "utils", "main", "benchmarks", "tests", "hydra_plugins")
# where this project's own components of a group lie, and what an object of the group must be able to do
HOMES: Mapping[str, tuple[str, ...]] = {
    "model": ("models.",),
    "data": ("data.",),
    "prune": ("prune.",),
    "recover": ("prune.recovery.",),
    "evals": ("evals.",),
    "tracker": ("evals.trackers.",),
}
ABILITIES: Mapping[str, frozenset[str]] = {
    "model": frozenset({"unit_groups", "logits"}),
    "data": frozenset({"prepare"}),
    "prune": frozenset({"check", "rank", "plan", "apply"}),
    "recover": frozenset({"recover"}),
    "evals": frozenset({"measure"}),
    "tracker": frozenset({"log"}),
}
BUNDLE, TRAINING = "DataBundle", "utils.training.Training"
# what tells Hydra's launchers and sweepers, and Optuna's samplers; a callback has methods that begin with `on_`
ENGINE_METHODS = frozenset({"launch", "sweep", "sample_independent"})
EXTRAS = ("hydra_plugins", "optuna")
LOG_CLASSES = ("logging.", "rich.logging.", "colorlog.")
# variables that decide what Python, the system's loader or a program that is started would load
LOADING, LOADING_NAMES = ("LD_", "DYLD_", "PYTHON", "GIT_"), ("PATH", "BROWSER", "BASH_ENV", "ENV", "SHELL")
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_KEYS = ("class", "()", "queue", "listener")


def why_refused(target: object, path: str) -> str | None:
    """Say why a target may not be called, or None if it may.

    Args:
        target: As the configuration has it.
        path: Where it stands, such as `prune`, `evals.latency` or `model.training`.
    """
    if not isinstance(target, str):
        return "must be text, the dotted name of a class or function"
    if not all(part.isidentifier() for part in target.split(".")):
        return None  # no dotted name: reading its signature says so
    group = _group_of(path)
    if target.split(".")[0] in sys.stdlib_module_names:
        return f"must be {_wanted(group)}; Python's own functions are none"
    home = _home_of(target)
    if home is None:
        return None  # there is no such module, or it has no source: reading its signature says so
    if home == "elsewhere":
        return _why_of_another_kind(target, group, proof=False)
    if home == "installed":
        return _why_of_another_kind(target, group, proof=True)
    return _why_not_own(target, group)


def is_model_builder(target: str) -> bool:
    """Whether a dotted name is one of this project's own functions that build models."""
    return _why_not_own(target, "model") is None and definition_of(target) is not None


def _group_of(path: str) -> str | None:
    """The group that a node is the component of; None for what belongs to a component."""
    parts = path.split(".")
    depth = 2 if parts[0] == "evals" else 1
    return parts[0] if len(parts) == depth and "[" not in path and parts[0] in HOMES else None


def _home_of(target: str) -> str | None:
    spec = find_module(target.split(".")[0])
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or []), spec.origin or ""]
    if any("site-packages" in place or "dist-packages" in place for place in places):
        return "installed"
    ours = any(Path(place).is_relative_to(PROJECT) for place in places if place)
    return "own" if ours and target.split(".")[0] in OWN else "elsewhere"


def _why_not_own(target: str, group: str | None) -> str | None:
    """A target of this project: only what lies with the components of its group."""
    if group is None:
        known = target == TRAINING or any(_why_not_own(target, name) is None for name in HOMES)
        return None if known else f"must be {_wanted(None)}"
    if not target.startswith(HOMES[group]):
        return f"must be {_wanted(group)}; this project's own lie in {' and '.join(h[:-1] for h in HOMES[group])}"
    # whoever puts a function into the group's folder need not annotate it
    return _why_of_another_kind(target, group, proof=True, silent=True)


def _why_of_another_kind(target: str, group: str | None, proof: bool, silent: bool = False) -> str | None:
    """Compare what the source says of a target with what its group needs.

    Args:
        target: A dotted name.
        group: Its group; None where any will do.
        proof: Whether a target that does not say what it gives is refused.
        silent: Whether a function may leave that out all the same.
    """
    if group is None:
        kinds = [_why_of_another_kind(target, name, proof) for name in HOMES]
        return None if None in kinds else f"must be {_wanted(None)}"
    found = definition_of(target)
    if found is None:
        return f"must be {_wanted(group)}; it can't be seen what it is" if proof and _is_there(target) else None
    owner = found[0].name.split(".")[0]
    if owner in sys.stdlib_module_names or (isinstance(found[1], ast.ImportFrom) and _leads_out(found[1])):
        return f"must be {_wanted(group)}; Python's own functions are none"
    made = found if isinstance(found[1], ast.ClassDef) else returned(*found)
    if made is None:
        plain = isinstance(found[1], FUNCTIONS) and _returns_plain(found[1])
        unsaid = plain or (proof and not (silent and isinstance(found[1], FUNCTIONS)))
        return f"must be {_wanted(group)}; it does not say that it gives one" if unsaid else None
    return None if _is_kind(made, group, proof) else f"must be {_wanted(group)}"


def _is_there(target: str) -> bool:
    """Whether there is such a name: one that is not is explained by its signature."""
    try:
        read_signature(target)
    except (TargetError, SyntaxError):
        return False
    return True


def _leads_out(node: ast.ImportFrom) -> bool:
    return not node.level and (node.module or "").split(".")[0] in sys.stdlib_module_names


def _returns_plain(node: ast.AST) -> bool:
    """Whether a function says that it returns nothing or a builtin value."""
    given = getattr(node, "returns", None)
    return given is not None and ast.unparse(given).split("[")[0] in {
        "None", "str", "int", "float", "bool", "bytes", "list", "dict", "tuple", "set",
    }  # fmt: skip


def _is_kind(made: tuple[Module, ast.stmt], group: str, proof: bool) -> bool:
    module, node = made
    if group == "data" and isinstance(node, ast.ClassDef) and node.name == BUNDLE:
        return True
    methods = methods_of(module, node)
    return not proof if methods is None else methods >= ABILITIES[group]


def _wanted(group: str | None) -> str:
    if group is None:
        return "a component of one of the groups, or a training"
    able = ", ".join(sorted(ABILITIES[group]))
    also = f", or a {BUNDLE}" if group == "data" else ""
    return f"a component of {group} (something with {able}{also})"


def engine_refusals(hydra: Mapping[Any, Any]) -> Iterator[str]:
    """What Hydra's own part of a configuration would call that is no engine, callback or log handler."""
    yield from _callback_mistakes(hydra.get("callbacks"))
    if not isinstance(hydra.get("verbose", False), bool | str | list):
        yield f"hydra.verbose={hydra['verbose']}: must be true, false, or names of loggers"
    for part in ("launcher", "sweeper", "callbacks"):
        for path, node in _nodes(hydra.get(part), f"hydra.{part}"):
            target = node.get("_target_")
            if target is not None and (why := _why_no_engine(target)):
                yield f"{path}._target_={target}: {why}"
    yield from _variable_refusals(hydra.get("job"))
    for part in ("job_logging", "hydra_logging"):
        yield from _log_mistakes(f"hydra.{part}", hydra.get(part))
        for path, node in _nodes(hydra.get(part), f"hydra.{part}"):
            yield from _log_refusals(path, node)


def _callback_mistakes(callbacks: object) -> Iterator[str]:
    """Callbacks that are none, or are given what they don't take."""
    for name, node in callbacks.items() if isinstance(callbacks, Mapping) else ():
        path = f"hydra.callbacks.{name}"
        if not isinstance(node, Mapping) or "_target_" not in node:
            yield f"{path}={node}: must be a mapping with a _target_"
        elif _why_no_engine(node["_target_"]) is None:
            signature = read_signature(node["_target_"])
            unknown = [key for key in node if key not in signature.parameters and not str(key).startswith("_")]
            rule = f"takes no such key; there is: {', '.join(signature.parameters) or 'none'}"
            yield from () if signature.open_ended else (f"{path}.{key}: {node['_target_']} {rule}" for key in unknown)


def _why_no_engine(target: object) -> str | None:
    rule = "must be a launcher, a sweeper or a callback of Hydra"
    if not isinstance(target, str) or "${" in target:
        return rule
    found = definition_of(target)
    if found is None:
        return None if _is_absent(target) else rule  # what is not installed is named with its package
    methods = methods_of(*found) or set()
    return None if methods & ENGINE_METHODS or any(name.startswith("on_") for name in methods) else rule


def _is_absent(target: str) -> bool:
    """Whether an extra's package is not there; Hydra's folder of plugins holds packages and no names of its own."""
    first, *rest = target.split(".")
    if first not in EXTRAS or not rest:
        return False
    return find_module(first) is None or (first == "hydra_plugins" and find_module(f"{first}.{rest[0]}") is None)


def _variable_refusals(job: object) -> Iterator[str]:
    """Variables of the environment that would make a process load something of the configuration's choice."""
    given = job.get("env_set") if isinstance(job, Mapping) else None
    for name, value in given.items() if isinstance(given, Mapping) else ():
        if str(name).upper().startswith(LOADING) or str(name).upper() in LOADING_NAMES:
            rule = "must not be set by a configuration, as it decides what programs load; set it in the environment"
            yield f"hydra.job.env_set.{name}={value}: {rule}"


def _log_mistakes(path: str, node: object) -> Iterator[str]:
    """Levels that are none, a version that is not known, and loggers whose handlers are not there."""
    if not isinstance(node, Mapping):
        return
    if node.get("version", 1) != 1:
        yield f"{path}.version={node['version']}: must be 1"
    given = node.get("handlers")
    handlers = list(given) if isinstance(given, Mapping) else []
    for name, part in [("root", node.get("root")), *_parts(node, "loggers"), *_parts(node, "handlers")]:
        if not isinstance(part, Mapping):
            continue
        level = part.get("level")
        if level is not None and not isinstance(level, int) and level not in logging.getLevelNamesMapping():
            yield f"{path}.{name}.level={level}: must be a level of logging, such as INFO"
        for handler in part.get("handlers") or ():
            if handler not in handlers:
                rule = f"must be handlers of {path}.handlers: {', '.join(map(str, handlers))}"
                yield f"{path}.{name}.handlers=[{handler}]: {rule}"


def _parts(node: Mapping[Any, Any], kind: str) -> list[tuple[str, object]]:
    parts = node.get(kind)
    return [(f"{kind}.{name}", part) for name, part in parts.items()] if isinstance(parts, Mapping) else []


def _log_refusals(path: str, node: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in node.items():
        where = f"{path}.{key}={value}"
        if key in LOG_KEYS and not isinstance(value, Mapping) and not _is_log_class(str(value)):
            yield f"{where}: must be a class of {', '.join(name[:-1] for name in LOG_CLASSES)}"
        if isinstance(value, str) and value.startswith("ext://") and value not in LOG_STREAMS:
            yield f"{where}: must be one of {', '.join(LOG_STREAMS)}"


def _is_log_class(target: str) -> bool:
    """Whether a class of one of the libraries of logs is named; what one of their modules imports is none."""
    found = definition_of(target) if target.startswith(LOG_CLASSES) else None
    return found is not None and isinstance(found[1], ast.ClassDef) and f"{found[0].name}.".startswith(LOG_CLASSES)


def _nodes(node: object, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping below a node, itself included."""
    if isinstance(node, Mapping):
        yield path, node
        for key, child in node.items():
            yield from _nodes(child, f"{path}.{key}")
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _nodes(child, f"{path}[{position}]")
