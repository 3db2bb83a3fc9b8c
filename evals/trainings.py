"""The recoveries of a sweep side by side: quality against epochs, a line a job.

Nothing here needs torch until there is something to draw.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURE = "recovery.png"
Row = Mapping[str, Any]


def draw_trainings(sweep: Path, rows: Sequence[Row], varied: Sequence[str]) -> bool:
    """Draw `recovery.png` if at least two jobs were recovered; returns whether it was.

    Args:
        sweep: Folder with one numbered folder per job.
        rows: One a job, with its overrides.
        varied: The overrides that tell the jobs apart.
    """
    found = {}
    for row in rows:
        history = history_of(sweep / str(row["job"]) / "result.json")
        if history:
            found[" ".join(f"{key}={row.get(key, '')}" for key in varied) or f"job {row['job']}"] = history
    quality = next(
        (name for name in _names(found) if name.startswith("validation_") and not name.endswith("loss")), None
    )
    if len(found) < 2 or quality is None:
        return False
    from evals.plots import save_figure
    from evals.weight_plots import side_by_side

    save_figure(side_by_side(found, quality), sweep / PICTURE)
    return True


def history_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a job's recovery; none where it has none, or its result can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["recovery"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found["history"] if found else []


def _names(found: Mapping[str, Sequence[Row]]) -> list[str]:
    return list(dict.fromkeys(name for history in found.values() for row in history for name in row))
