"""What every tracker is told of a run: its configuration, its figures by name, its pictures."""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from utils.errors import InputError


class Tracker(Protocol):
    """Hands a finished run, a failed one too, to a service or a file of its own."""

    def log(self, result: Mapping[str, Any], out: Path) -> None:
        """Take in the content of result.json, and the run's folder with its plots."""
        ...


def refuse_missing(tracker: str, package: str) -> None:
    """Raise an InputError with the install command if a tracker's package is not there."""
    if find_spec(package) is None:
        raise InputError(
            f"tracker={tracker}: the package {package} is not installed; pip install -r requirements-{tracker}.txt"
        )


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a run by name: `dense/accuracy`, `pruned/latency_speedup`, `seconds/total`, `ratio_reached`."""
    found: dict[str, Any] = {}
    for side in ("dense", "pruned"):
        for name, measured in result[side].items():
            found[f"{side}/{name}"] = measured.get("value")
            found[f"{side}/{name}_speedup"] = measured.get("speedup")
    plan = result.get("plan") or {}
    found |= {name: plan.get(name) for name in ("ratio_asked", "ratio_reached")}
    found |= {f"seconds/{name}": seconds for name, seconds in result["seconds"].items()}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as one flat mapping: `prune.ratio`, `model.depth`."""
    return dict(_flat(result["config"], ""))


def curves_of(result: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Every point of the learning curves as (name, epoch, value)."""
    recovery = result.get("recovery") or {}
    for curve, rows in (("train", result.get("history") or []), ("recover", recovery.get("history") or [])):
        for row in rows:
            for name, value in row.items():
                if name != "epoch" and _is_number(value):
                    yield f"{curve}/{name}", int(row["epoch"]), float(value)


def pictures(out: Path) -> list[Path]:
    """The plots that a run drew."""
    return sorted((out / "plots").glob("*.png"))


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        yield path, ", ".join(map(str, node))
    else:
        yield path, node


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
