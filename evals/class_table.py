"""The IoU of every class, dense and pruned side by side.

Works on the plain values of result.json; nothing here needs torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evals.values import change, shown

HEADINGS = ("class", "dense (%)", "pruned (%)", "change")
Measured = Mapping[str, Mapping[str, Any]]


def class_rows(dense: Measured, pruned: Measured) -> list[tuple[str, str, str, str]]:
    """One row a class that occurs in labels or predictions; none where no IoU was measured.

    Args:
        dense: Measurements of the dense model by name, as in result.json.
        pruned: Of the pruned one.
    """
    before, after = (found.get("mean_iou", {}).get("per_class") or {} for found in (dense, pruned))
    names = [name for name in before if before[name] is not None or after.get(name) is not None]
    return [(name, *_cells(before[name], after.get(name))) for name in names if name in after]


def _cells(*ious: float | None) -> tuple[str, str, str]:
    before, after = ({"value": iou, "unit": "fraction", "reason": "absent"} for iou in ious)
    return shown(before), shown(after), change(before, after)


def class_block(dense: Measured, pruned: Measured) -> str:
    """The table as Markdown; empty where there is none."""
    rows: Sequence[Sequence[str]] = class_rows(dense, pruned)
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|--:|--:|--:|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) if rows else ""
