"""The page about a sweep: its jobs under names that say what was varied, and what must not be compared on top."""

from collections.abc import Mapping
from typing import Any

from evals.compare import NEEDED, differences, misshapen
from evals.page import page

Result = dict[str, Any]


def sweep_page(jobs: Mapping[str, Result | str], overrides: Mapping[str, Mapping[str, str]]) -> str:
    """The page as HTML.

    Args:
        jobs: Per job its result, or why there is none.
        overrides: Per job what it was given on the command line.
    """
    results = {job: result for job, result in jobs.items() if isinstance(result, dict)}
    notes = [f"Job {job} left no result: {reason}" for job, reason in jobs.items() if isinstance(reason, str)]
    notes += [f"Job {job} {r['status']}: {r.get('error')}" for job, r in results.items() if r["status"] != "ok"]
    notes += _incomparable({job: r for job, r in results.items() if r["status"] == "ok"})
    keys = dict.fromkeys(key for job in jobs for key in overrides[job])
    varied = [key for key in keys if len({overrides[job].get(key) for job in jobs}) > 1]
    names = {job: " ".join([job, *(f"{key}={overrides[job].get(key, '')}" for key in varied)]) for job in jobs}
    good = {names[job]: r for job, r in results.items() if r["status"] == "ok"}
    return page(f"Sweep of {len(jobs)} jobs", good, notes)


def _incomparable(results: Mapping[str, Result]) -> list[str]:
    """Differences of data and protocol between the first job and others, each said once."""
    whole = [(job, result) for job, result in results.items() if all(k in result for k in NEEDED)]
    whole = [(job, result) for job, result in whole if misshapen(result) is None]
    found: dict[str, list[str]] = {}
    for job, result in whole[1:]:
        for problem in differences(whole[0][1], result):
            found.setdefault(problem, []).append(job)
    return [f"Do not compare job {whole[0][0]} with job {', '.join(jobs)}: {what}" for what, jobs in found.items()]
