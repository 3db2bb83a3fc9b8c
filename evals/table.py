"""Dense and pruned side by side, as text."""

from collections.abc import Mapping, Sequence

from evals import values
from evals.base import Measurement, Measurements


def markdown_table(dense: Measurements, pruned: Measurements) -> str:
    """The comparison as a Markdown table."""
    lines = ["| metric | dense | pruned | change | unit |", "|---|--:|--:|--:|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows(dense, pruned)])


def three_columns(dense: Measurements, cut: Measurements, recovered: Measurements) -> str:
    """Dense, pruned and recovered as a Markdown table."""
    lines = ["| metric | dense | pruned | recovered | change | unit |", "|---|--:|--:|--:|--:|---|"]
    for name, after in recovered.items():
        if name in dense and name in cut:
            found = [dense[name].to_json(), cut[name].to_json(), after.to_json()]
            cells = [name, *map(values.shown, found), values.change(found[0], found[2]), values.unit_of(found[2])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def how_list(found: Measurements) -> str:
    """How each figure was measured, one line each."""
    return "\n".join(f"- `{name}`: {measured.how.rstrip('.')}." for name, measured in found.items() if measured.how)


def history_table(history: Sequence[Mapping[str, float]]) -> str:
    """A learning curve as a Markdown table; epoch 0 is before any training."""
    names = list(history[-1])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'--:|' * len(names)}"]
    cells = ([f"{row[name]:.4g}" if name in row else "" for name in names] for row in history)
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def rows(dense: Measurements, pruned: Measurements) -> list[tuple[str, ...]]:
    """One row a metric: name, dense, pruned, change, unit."""
    return [
        (name, shown(dense[name]), shown(after), change(dense[name], after), values.unit_of(after.to_json()))
        for name, after in pruned.items()
        if name in dense
    ]


def shown(found: Measurement) -> str:
    """A value as people read it; `n/a` with the reason where there is none."""
    return values.shown(found.to_json())


def change(before: Measurement, after: Measurement) -> str:
    """Points for fractions, a difference for losses, percent and speed-up for the rest."""
    return values.change(before.to_json(), after.to_json())
