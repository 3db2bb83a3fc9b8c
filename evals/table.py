"""Dense and pruned side by side, as text."""

from collections.abc import Mapping, Sequence

from evals.base import Measurement, Measurements

SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def markdown_table(dense: Measurements, pruned: Measurements) -> str:
    """The comparison as a Markdown table."""
    lines = ["| metric | dense | pruned | change | unit |", "|---|--:|--:|--:|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows(dense, pruned)])


def history_table(history: Sequence[Mapping[str, float]]) -> str:
    """A learning curve as a Markdown table; epoch 0 is before any training."""
    names = list(history[-1])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'--:|' * len(names)}"]
    cells = ([f"{row[name]:.4g}" if name in row else "" for name in names] for row in history)
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def rows(dense: Measurements, pruned: Measurements) -> list[tuple[str, ...]]:
    """One row a metric: name, dense, pruned, change, unit."""
    return [
        (name, shown(dense[name]), shown(after), change(dense[name], after), _unit(after))
        for name, after in pruned.items()
        if name in dense
    ]


def _unit(found: Measurement) -> str:
    if found.unit == "fraction":
        return "%"
    batch, tokens = found.details.get("batch"), found.details.get("tokens")
    if tokens:
        return f"{found.unit} of {tokens} tokens"
    return f"{found.unit} (batch {batch})" if batch else found.unit


def shown(found: Measurement) -> str:
    """A value as people read it; `n/a` with the reason where there is none."""
    value = found.value
    if value is None:
        return f"n/a ({found.reason})"
    if found.unit == "fraction":
        return f"{100 * value:.2f}"
    if found.unit in ("nat", "ms", "squared error"):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"
    scale, prefix = next(((s, p) for s, p in SCALES if abs(value) >= s), (1, ""))
    return f"{value / scale:.4g} {prefix}".strip() if scale > 1 else f"{value:.4g}"


def change(before: Measurement, after: Measurement) -> str:
    """Points for fractions, a difference for losses, percent and speed-up for the rest."""
    if before.value is None or after.value is None:
        return ""
    if after.unit == "fraction":
        return f"{100 * (after.value - before.value):+.2f} points"
    if after.unit in ("nat", "squared error"):
        return f"{after.value - before.value:+.4f}"
    if "speedup" in after.details:
        return f"{after.details['speedup']:.2f}x as fast"
    return f"{after.value / before.value - 1:+.1%}" if before.value else ""
