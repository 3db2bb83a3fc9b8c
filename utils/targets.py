"""What a `_target_` may be: a component of its group, of this project or of anybody's own module.

Configurations are data. Calling whatever they name would make every callable of Python and of the installed
libraries a command, so that a target is looked at in its source before anything is imported.
"""

import ast
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
OWN = ("models", "data", "prune", "evals", "utils", "main", "benchmarks")
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
ENGINES = (
    "hydra._internal.core_plugins.",
    "hydra.experimental.callbacks.",
    "hydra_plugins.",
    "evals.sweep.SweepReport",
)
LOG_CLASSES = ("logging.", "rich.logging.", "colorlog.")
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_KEYS = ("class", "()")


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
    for part in ("launcher", "sweeper", "callbacks"):
        for path, node in _nodes(hydra.get(part), f"hydra.{part}"):
            target = node.get("_target_")
            if target is not None and (why := _why_no_engine(target)):
                yield f"{path}._target_={target}: {why}"
    for part in ("job_logging", "hydra_logging"):
        for path, node in _nodes(hydra.get(part), f"hydra.{part}"):
            yield from _log_refusals(path, node)


def _why_no_engine(target: object) -> str | None:
    rule = "must be a launcher, a sweeper or a callback of Hydra"
    if not isinstance(target, str) or "${" in target or target.split(".")[0] in sys.stdlib_module_names:
        return rule
    if target.startswith(ENGINES):
        return None
    found = definition_of(target)
    if found is None:
        return None if _home_of(target) is None else rule
    methods = methods_of(*found) or set()
    return None if methods & {"launch", "sweep"} or any(name.startswith("on_") for name in methods) else rule


def _log_refusals(path: str, node: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in node.items():
        where = f"{path}.{key}={value}"
        if key in LOG_KEYS and not str(value).startswith(LOG_CLASSES):
            yield f"{where}: must be a class of {', '.join(name[:-1] for name in LOG_CLASSES)}"
        if isinstance(value, str) and value.startswith("ext://") and value not in LOG_STREAMS:
            yield f"{where}: must be one of {', '.join(LOG_STREAMS)}"


def _nodes(node: object, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping below a node, itself included."""
    if isinstance(node, Mapping):
        yield path, node
        for key, child in node.items():
            yield from _nodes(child, f"{path}.{key}")
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _nodes(child, f"{path}[{position}]")
