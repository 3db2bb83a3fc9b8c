"""Check a composed configuration against the signatures of its targets, all at once.

Nothing heavy is imported here: signatures and types come from source files.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config import ROOT_RULES
from utils.rules import broken_rule
from utils.signature import Signature, TargetError, read_signature

RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def find_problems(cfg: DictConfig) -> list[str]:
    """List every mistake of a composed configuration; an empty list means none.

    Covers missing values, unknown and missing arguments of every `_target_`, their types
    and ranges, targets that do not exist, and interpolations that lead nowhere.
    """
    plain, problems = _resolved(cfg)
    for key, rule in ROOT_RULES.items():
        value = plain.get(key)
        if value != "???" and (broken := broken_rule(value, rule)):
            problems.append(f"{key}={_shown(value)}: {broken}")
    return [*problems, *_node_problems(plain, "")]


def suggest(name: str, known: Iterable[str]) -> str:
    """Phrase what was probably meant, followed by everything there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there is: {', '.join(names)}" if names else "there is none"


def _resolved(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Convert to plain Python; an interpolation that fails is reported and left out."""
    problems: list[str] = []

    def walk(node: Any, path: str) -> Any:
        if OmegaConf.is_list(node):
            return [walk(item, f"{path}[{i}]") for i, item in enumerate(_items(node, path))]
        if not OmegaConf.is_dict(node):
            return node
        found = {}
        for key in node:
            inner = f"{path}.{key}".lstrip(".")
            if OmegaConf.is_missing(node, key):
                found[key] = "???"
                continue
            try:
                found[str(key)] = walk(node[key], inner)
            except OmegaConfBaseException as error:
                problems.append(f"{inner}: {str(error).splitlines()[0]}")
        return found

    def _items(node: Any, path: str) -> Iterator[Any]:
        for i in range(len(node)):
            try:
                yield node[i]
            except OmegaConfBaseException as error:
                problems.append(f"{path}[{i}]: {str(error).splitlines()[0]}")

    return walk(cfg, ""), problems


def _node_problems(node: object, path: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield from _target_problems(node, path)
        for key, child in node.items():
            yield from _node_problems(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _node_problems(child, f"{path}[{position}]")
    elif node == "???":
        yield f"{path}: no value given"


def _target_problems(node: Mapping[str, Any], path: str) -> Iterator[str]:
    target = node["_target_"]
    try:
        signature = read_signature(str(target))
    except (TargetError, SyntaxError) as error:
        yield f"{path}._target_={target}: {error}"
        return
    given = {key: value for key, value in node.items() if key not in RESERVED}
    for key, value in given.items():
        yield from _argument_problems(signature, str(target), f"{path}.{key}", key, value)
    if not node.get("_partial_") and not node.get("_args_"):
        missing = [n for n, p in signature.parameters.items() if p.required and n not in given]
        for name in missing:
            yield f"{path}.{name}: no value given; {target} needs it"


def _argument_problems(signature: Signature, target: str, path: str, key: str, value: object) -> Iterator[str]:
    parameter = signature.parameters.get(key)
    if parameter is None and not signature.open_ended:
        hint = suggest(key, signature.parameters)
        yield f"{path}={_shown(value)}: {target} takes no {key!r}; {hint}"
    is_object = isinstance(value, Mapping) and "_target_" in value
    if parameter is not None and value != "???" and not is_object:
        if broken := broken_rule(value, parameter.annotation):
            yield f"{path}={_shown(value)}: {broken}"


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
