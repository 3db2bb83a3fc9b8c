"""A model's scores in a few numbers a layer: what result.json keeps of them, and what the page draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prune.base import GroupPlan, Plan, Scores

# the least, the quartiles and the most
SHARES = (0, 25, 50, 75, 100)
Five = list[float] | None


def score_summary(plan: Plan, scores: Scores) -> list[dict[str, Any]]:
    """One row for each term and unit group of a plan that was scored.

    Returns:
        Rows of `term`, `name`, `kind`, `layer`, and under `kept` and `removed` the least score, the quartiles and the
        most of the units that stay and of those that go; None where there are none.
    """
    return [
        {
            "term": term, "name": group.name, "kind": group.kind, "layer": group.layer,
            **_sides(group, np.asarray(groups[group.name], dtype=float)),
        }
        for term, groups in scores.terms.items()
        for group in plan.groups
        if group.name in groups and group.count
    ]  # fmt: skip


def _sides(group: GroupPlan, values: np.ndarray) -> Mapping[str, Five]:
    kept = np.isin(np.arange(group.count), group.kept)
    return {"kept": _five(values[kept]), "removed": _five(values[~kept])}


def _five(values: np.ndarray) -> Five:
    return [float(v) for v in np.percentile(values, SHARES)] if len(values) else None
