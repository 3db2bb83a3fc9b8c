"""Where a pass spends its time, dense beside pruned, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from evals.base import Measurements

Operator = Mapping[str, Any]
COLUMNS = ("operator", "calls", "ms", "calls", "ms", "change")


def profile_blocks(dense: Measurements, pruned: Measurements) -> str:
    """Tables of kinds and operators of two profiles; empty where nothing was profiled."""
    found = [side["profile"].details for side in (dense, pruned) if "profile" in side and side["profile"].details]
    if len(found) < 2:
        return ""
    before, after = found
    kinds = [{"name": name, "calls": "", "ms": ms} for name, ms in before["kinds"].items()]
    kinds_after = [{"name": name, "calls": "", "ms": ms} for name, ms in after["kinds"].items()]
    device = before["sorted_by"]
    return "\n\n".join(
        [
            f"One pass at batch {before['batch']}, {device} time by kind of operator:",
            beside(kinds, kinds_after),
            "The operators that take most of it (time of their own, without what they call):",
            beside(before["operators"], after["operators"]),
        ]
    )


def beside(dense: Sequence[Operator], pruned: Sequence[Operator]) -> str:
    """Two lists of operators as one table in fixed width, in the order of the dense one's time."""
    theirs = {row["name"]: row for row in pruned}
    names = [row["name"] for row in dense] + [row["name"] for row in pruned if row["name"] not in _names(dense)]
    ours = {row["name"]: row for row in dense}
    rows = [_row(name, ours.get(name), theirs.get(name)) for name in names]
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    head = " " * (widths[0] + 2) + "dense".rjust(widths[1] + widths[2] + 2) + "pruned".rjust(sum(widths[3:5]) + 4)
    lines = [_line(row, widths) for row in [COLUMNS, *rows]]
    return "\n".join(["```text", head, *lines, "```"])


def _names(rows: Sequence[Operator]) -> set[str]:
    return {row["name"] for row in rows}


def _row(name: str, dense: Operator | None, pruned: Operator | None) -> tuple[str, ...]:
    cells = [c for row in (dense, pruned) for c in ((str(row["calls"]), f"{row['ms']:.3f}") if row else ("-", "-"))]
    change = f"{pruned['ms'] / dense['ms'] - 1:+.0%}" if dense and pruned and dense["ms"] else ""
    return (name, *cells, change)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
    return "  ".join([first.ljust(widths[0]), *cells]).rstrip()
