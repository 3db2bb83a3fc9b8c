"""Figures as people read them, from the plain values of result.json."""

import math
from collections.abc import Mapping
from typing import Any

from evals.protocols import protocol_of

SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LOSSES = ("nat", "squared error")
# of perplexities
PER_TEXT = ("per token", "per word", "per byte")
Found = Mapping[str, Any]


def quality_of(measured: Mapping[str, Found]) -> str | None:
    """The metric that tells how good a model is: the first share of a split, else the first perplexity."""
    for units in (("fraction",), PER_TEXT):
        if (found := next((name for name, m in measured.items() if m.get("unit") in units), None)) is not None:
            return found
    return None


def shown(found: Found) -> str:
    """A value; `n/a` with the reason where there is none."""
    value, unit = found.get("value"), found.get("unit")
    if value is None:
        return f"n/a ({found['reason']})" if found.get("reason") else "n/a"
    if unit == "fraction":
        return f"{100 * value:.2f}"
    if unit in (*LOSSES, "ms"):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"
    return scaled(value)


def scaled(value: float) -> str:
    """A number with four digits and a prefix."""
    scale, prefix = next(((s, p) for s, p in SCALES if abs(value) >= s), (1, ""))
    return f"{value / scale:.4g} {prefix}".strip() if scale > 1 else f"{value:.4g}"


def unit_of(found: Found) -> str:
    """The unit with the batch, length or protocol that it holds for."""
    unit, batch, tokens = found.get("unit") or "", found.get("batch"), found.get("tokens")
    if unit == "fraction":
        return "%"
    if (protocol := protocol_of(found)) is not None:
        return f"{unit}, {protocol.name}"
    if isinstance(tokens, int):
        return f"{unit} of {tokens} tokens"
    return f"{unit} (batch {batch})" if isinstance(batch, int) else str(unit)


def change(before: Found, after: Found) -> str:
    """Points for fractions, a difference for losses, speed-up with its interval for times, percent for the rest."""
    old, new, unit = before.get("value"), after.get("value"), after.get("unit")
    if old is None or new is None:
        return ""
    if unit == "fraction":
        return f"{100 * (new - old):+.2f} points"
    if unit in LOSSES:
        return f"{new - old:+.4f}"
    if after.get("speedup") is not None:
        bounds = after.get("speedup_interval")
        return f"{after['speedup']:.2f}x as fast" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")
    return f"{new / old - 1:+.1%}" if old else ""


def prefixed(value: object) -> str:
    """Anything of a record in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {prefixed(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(prefixed, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "unknown" if value is None else str(value)


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, by null wherever they stand."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
