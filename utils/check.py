"""Check a composed configuration against the signatures of its targets, all at once.

Nothing heavy is imported here: signatures and types come from source files.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config import ROOT_RULES, Config
from utils.rules import broken_rule
from utils.secrets import COVER, redacted, why_secret, why_secret_key
from utils.signature import Signature, TargetError, read_signature
from utils.targets import why_refused

UNKNOWN = "<unresolved>"
# references may name each other, so that a few lines stand for any number of values
MOST_VALUES, MOST_DEEP = 5_000, 64
CONVERSIONS = ("none", "partial", "object", "all")
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


@dataclass(frozen=True)
class Problem:
    """A mistake and the key where it stands."""

    key: str
    text: str


def find_problems(cfg: DictConfig, metrics: Collection[str] = ()) -> list[str]:
    """List every mistake of a composed configuration; an empty list means none.

    Args:
        cfg: The configuration.
        metrics: All that could be selected; what an experiment sets for one that is not waits for it.

    Covers missing values, unknown and missing arguments of every `_target_`, their types
    and ranges, targets that do not exist, and interpolations that lead nowhere. A mistake
    that other keys inherit by `${...}` is reported once, where it stands.
    """
    plain, problems = resolved(cfg)
    for key, rule in ROOT_RULES.items():
        value = plain.get(key)
        if value != "???" and (broken := broken_rule(value, rule)):
            problems.append(Problem(key, f"{key}={_shown(value)}: {broken}"))
    problems += _secret_problems(cfg, plain)
    problems += _root_problems(plain, metrics)
    problems += _node_problems(plain, "")
    at_fault = {problem.key for problem in problems}
    return [redacted(p.text) for p in problems if not _sources(cfg, p.key) & (at_fault - {p.key})]


def _sources(cfg: DictConfig, key: str) -> set[str]:
    """The keys that `key` takes its value from by reference."""
    parent, _, leaf = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    except (OmegaConfBaseException, ValueError, RecursionError):  # a key that can't be written as one
        return set()
    if not OmegaConf.is_dict(node) or leaf not in node:
        return set()
    raw = OmegaConf.to_container(node, resolve=False)[leaf]  # type: ignore[index, call-overload]
    found = re.findall(r"\$\{(?:oc\.select:)?([\w.]+)[},]", raw) if isinstance(raw, str) else []
    return {f"{parent}{name}" if name.startswith(".") else name for name in found}


def suggest(name: str, known: Iterable[str]) -> str:
    """Phrase what was probably meant, followed by everything there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there is: {', '.join(names)}" if names else "there is none"


def resolved(cfg: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Convert to plain Python; a value that can't be resolved is reported and left unknown."""
    problems: list[Problem] = []
    seen = count()

    def value_at(node: Any, key: Any, path: str, depth: int) -> Any:
        if OmegaConf.is_missing(node, key):
            return "???"
        if (number := next(seen)) >= MOST_VALUES or depth > MOST_DEEP:
            if number <= MOST_VALUES:
                rule = f"must be at most {MOST_VALUES} values, at most {MOST_DEEP} deep, with all references followed"
                problems.append(Problem(path, f"{_cut(path)}: {rule}"))
            return UNKNOWN
        try:
            return walk(node[key], path, depth + 1)
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(Problem(path, f"{_cut(path)}: {str(error).splitlines()[0]}"))
            return UNKNOWN

    def walk(node: Any, path: str, depth: int) -> Any:
        if OmegaConf.is_list(node):
            return [value_at(node, i, f"{path}[{i}]", depth) for i in range(len(node))]
        if OmegaConf.is_dict(node):
            return {str(key): value_at(node, key, f"{path}.{key}".lstrip("."), depth) for key in node}
        return node

    return walk(cfg, "", 0), problems


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:80]}… ({len(text)} characters)"


def _root_problems(plain: Mapping[str, Any], metrics: Collection[str]) -> Iterator[Problem]:
    """Unknown keys at the root, and components that are no component."""
    known = {field.name for field in fields(Config)}
    for key in plain.keys() - known:
        yield Problem(key, f"{key}={_shown(plain[key])}: the configuration has no key {key!r}; {suggest(key, known)}")
    for key in known - ROOT_RULES.keys():
        node = plain.get(key)
        components = {key: node}
        if key == "evals" and isinstance(node, Mapping):
            components = {f"evals.{n}": m for n, m in node.items() if n not in metrics or is_selected(m)}
        for path, component in components.items():
            if component != "???" and not (isinstance(component, Mapping) and "_target_" in component):
                rule = f"must be one of the options of {key.split('.')[0]}, a mapping with a _target_"
                yield Problem(path, f"{path}={_shown(component)}: {rule}")


def is_selected(metric: object) -> bool:
    """Whether a node among the metrics is one of its own, and not only settings for one."""
    return not isinstance(metric, Mapping | DictConfig) or "_target_" in metric


def _secret_problems(cfg: DictConfig, plain: Mapping[str, Any]) -> Iterator[Problem]:
    """Tokens, passwords and the like, as they are written and as they resolve; the text does not repeat them."""
    written = OmegaConf.to_container(cfg, resolve=False)
    leaves = [*_leaves(plain, ""), *_leaves(written, "")]
    # nearly always there is none, which one look at all of them tells
    clean = why_secret("\n".join(f"{path}\n{value}" for path, value in leaves)) is None
    said: set[str] = set()
    for path, value in leaves:
        if path in said or (clean and not why_secret_key(path, value)):
            continue
        held = path == redacted(path)
        why = why_secret_key(path, value) or (why_secret(value) if isinstance(value, str) else None)
        if why := why if held else "holds a token or key in its name":
            said.add(path)
            yield Problem(path, f"{path}={COVER}: {why}")


def _leaves(node: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _leaves(child, f"{path}[{position}]")
    else:
        yield path, node


def _node_problems(node: object, path: str) -> Iterator[Problem]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield from _target_problems(node, path)
        for key, child in node.items():
            yield from _node_problems(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _node_problems(child, f"{path}[{position}]")
    elif node == "???":
        yield Problem(path, f"{path}: no value given")


def _target_problems(node: Mapping[str, Any], path: str) -> Iterator[Problem]:
    target = node["_target_"]
    if why := why_refused(target, path):
        yield Problem(f"{path}._target_", f"{path}._target_={_shown(target)}: {why}")
        return
    try:
        signature = read_signature(str(target))
    except (TargetError, SyntaxError) as error:
        yield Problem(f"{path}._target_", f"{path}._target_={target}: {error}")
        return
    yield from _calling_problems(node, path)
    given = {key: value for key, value in node.items() if key not in RESERVED}
    for key, value in given.items():
        yield from _argument_problems(signature, str(target), f"{path}.{key}", key, value)
    if not node.get("_partial_") and not node.get("_args_"):
        missing = [n for n, p in signature.parameters.items() if p.required and n not in given]
        for name in missing:
            yield Problem(f"{path}.{name}", f"{path}.{name}: no value given; {target} needs it")


def _calling_problems(node: Mapping[str, Any], path: str) -> Iterator[Problem]:
    """Hydra's own keys that say how a target is called."""
    rules = {"_args_": None, "_partial_": bool, "_recursive_": bool, "_convert_": Literal[CONVERSIONS]}
    for key, rule in rules.items():
        if key not in node or node[key] == UNKNOWN:
            continue
        why = "is not taken; give every argument by its name" if rule is None else broken_rule(node[key], rule)
        if key == "_partial_" and node[key] is True and path.count(".") == path.startswith("evals."):
            why = "must be false: a component is built, and not left for later"
        if why:
            yield Problem(f"{path}.{key}", f"{path}.{key}={_shown(node[key])}: {why}")


def _argument_problems(signature: Signature, target: str, path: str, key: str, value: object) -> Iterator[Problem]:
    parameter = signature.parameters.get(key)
    if parameter is None and not signature.open_ended:
        hint = suggest(key, signature.parameters)
        yield Problem(path, f"{path}={_shown(value)}: {target} takes no {key!r}; {hint}")
    if parameter is not None and value not in ("???", UNKNOWN) and not _holds_object(value):
        if broken := broken_rule(value, parameter.annotation):
            yield Problem(path, f"{path}={_shown(value)}: {broken}")


def _holds_object(value: object) -> bool:
    """Whether a value is, or contains, something that is only built later."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_holds_object, value.values()))
    return isinstance(value, list) and any(map(_holds_object, value))


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value:
        return repr(value)  # text that looks like a number
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
