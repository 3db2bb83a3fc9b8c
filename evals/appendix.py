"""What a sweep's table has no room for: why a value is missing, and what the models wrote.

Works on the plain values of result.json, without torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.texts import text_blocks

PROMPTS = 1


def appendix(jobs: Sequence[Path]) -> str:
    """Markdown to follow a sweep's table: a line for each reason, then the texts; empty where there is neither.

    Args:
        jobs: The jobs' folders.
    """
    found = {job.name: result for job in jobs if (result := _result(job)) is not None}
    parts = [*_reasons(found)]
    if texts := _texts(found):
        parts += ["## What they write", texts]
    return "".join(f"\n{part}\n" for part in parts)


def _result(job: Path) -> dict[str, Any] | None:
    """A job's result if it is whole."""
    path = job / "result.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return None
    whole = isinstance(found, dict) and found.get("status") == "ok" and {"dense", "pruned"} <= found.keys()
    return found if whole else None


def _reasons(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each reason why a pruned model has no value: which figures, of which jobs."""
    where: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for job, result in results.items():
        for name, measured in result["pruned"].items():
            if measured.get("value") is None and measured.get("reason"):
                names, jobs = where.setdefault(str(measured["reason"]), ({}, {}))
                names[name], jobs[job] = None, None
    return [
        f"No {', '.join(names)} of job {', '.join(jobs)}: {' '.join(reason.split())}."
        for reason, (names, jobs) in where.items()
    ]


def _texts(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The first prompt's continuations by the dense model and by every job that shares it."""
    first = next((result for result in results.values() if _written(result["dense"])), None)
    if first is None:
        return ""
    alike = {job: r for job, r in results.items() if _written(r["dense"]) == _written(first["dense"])}
    return text_blocks({"Dense": first["dense"], **{_heading(j, r): r["pruned"] for j, r in alike.items()}}, PROMPTS)


def _written(measured: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [[text.get("tokens") for text in found["continuations"]] for found in measured.values()
            if found.get("continuations")]  # fmt: skip


def _heading(job: str, result: Mapping[str, Any]) -> str:
    asked = (result.get("plan") or {}).get("ratio_asked")
    ratio = f" {asked:.0%}" if isinstance(asked, int | float) else ""
    return f"{result.get('method')}{ratio} (job {job})"
