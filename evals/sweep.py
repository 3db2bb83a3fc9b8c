"""A sweep's table, report and Pareto plot, rebuilt at any time from its jobs' own files.

Nothing here needs torch: Hydra builds the callback before a configuration is known to be good.
"""

import csv
import io
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from evals.appendix import appendix
from evals.protocols import SIDES, Columns, column_names, protocol_of
from evals.trainings import draw_trainings
from evals.values import finite, quality_of
from utils.composing import ComposedOnce, read_once
from utils.files import write_atomically
from utils.jobs import given_to
from utils.locks import Lock, locked
from utils.starter import end_with_starter

log = logging.getLogger(__name__)

Row = dict[str, Any]
TIMED = ("latency", "throughput", "prefill", "first_token", "decode", "energy", "co2")
MERGING = ".merging.lock"
FIXED = ("job", "status", "error", "method", "ratio_asked", "ratio_reached", "cache_hit", "seconds", "quality")


class SweepReport(Callback):
    """Keeps a sweep's files current; Hydra calls it in whichever process ran the job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Let the jobs share what is read and composed for them."""
        loader = GlobalHydra.instance().config_loader()
        read_once(loader)
        loader.load_sweep_config = ComposedOnce(loader)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Work where the sweep was started, so that relative paths mean the same in every process, and no longer."""
        if _is_sweep(config):
            end_with_starter()
        home = Path(config.hydra.runtime.cwd)
        if _is_sweep(config) and home.is_dir() and not home.samefile(Path.cwd()):
            os.chdir(home)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Rebuild after each job, also one that failed."""
        if _is_sweep(config):
            try:
                refresh(Path(config.hydra.sweep.dir))
            except OSError as error:  # the job's own result stands, and the sweep's end tries again
                print(f"the sweep's table can't be renewed ({error.strerror})", file=sys.stderr, flush=True)


def _is_sweep(config: DictConfig) -> bool:
    return str(config.hydra.mode).endswith("MULTIRUN")


def close(sweep: Path) -> bool:
    """Bring a sweep's files to their end, whoever ran its jobs and whatever became of them.

    Returns:
        Whether there are jobs and all are well.
    """
    rows = rebuild(sweep) if sweep.is_dir() else []
    if rows:
        write_page(sweep)
        log.info("%d jobs; table and plot: %s", len(rows), sweep / "report.html")
    left = [row["job"] for row in rows if row["status"] != "ok"]
    if left:
        print(
            f"{len(left)} of {len(rows)} jobs have no good result; the same command and resume={sweep} does them again"
        )
    return bool(rows) and not left


def refresh(sweep: Path) -> None:
    """Rebuild, unless another process is at it: that one looks again when it is done.

    So the last job's row is never missed, and many jobs that end together do not queue.
    """
    while True:
        seen = _results(sweep)
        lock = Lock(sweep / MERGING)
        if not lock.acquire(timeout=0):
            return
        try:
            _rebuild(sweep)
        finally:
            lock.release()
        if _results(sweep) == seen:
            return


def _results(sweep: Path) -> dict[str, int]:
    """When each job's result was last written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sweep.glob("*/result.json")}


def rebuild(sweep: Path) -> list[Row]:
    """Collect every job of a sweep into results.csv, report.md and pareto.png.

    Args:
        sweep: Folder with one numbered folder per job.

    Returns:
        One row a job, in the jobs' order.
    """
    with locked(sweep / MERGING):
        return _rebuild(sweep)


def _rebuild(sweep: Path) -> list[Row]:
    jobs = sorted((p for p in sweep.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    found = [_read(job) for job in jobs]
    columns = column_names(result for result in found if isinstance(result, dict))
    rows = [_row(job, result, columns) for job, result in zip(jobs, found, strict=True)]
    if not rows:
        return rows
    write_atomically(sweep / "results.csv", _csv(rows).encode(), synced=False)
    drawn = _draw_pareto(rows, sweep / "pareto.png")
    draw_trainings(sweep, rows, _varied(rows))
    text = _markdown(rows, drawn, _legend(columns)) + appendix(jobs)
    write_atomically(sweep / "report.md", text.encode(), synced=False)
    return rows


def write_page(sweep: Path) -> None:
    """Write report.html about all jobs of a sweep that left a result; once, when all are there."""
    from evals.sweep_page import sweep_page

    jobs = sorted((p for p in sweep.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    if jobs:
        found = {job: _read(job) for job in jobs}
        overrides = {job.name: _overrides(job) for job in jobs}
        shown = sweep_page({job.name: said for job, said in found.items()}, overrides)
        write_atomically(sweep / "report.html", shown.encode(), synced=False)


def _read(job: Path) -> dict[str, Any] | str:
    """A job's result.json, or why there is none."""
    path = job / "result.json"
    if not path.is_file():
        return "it left no result.json"
    try:
        found = finite(json.loads(path.read_text(encoding="utf-8")))
        _facts(found, {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"result.json is damaged: {error!r}"
    return found


def _legend(columns: Columns) -> list[str]:
    """The full protocol of every column that has one."""
    return [f"`{column}`: {p}." for named in columns.values() for p, column in named.items() if p is not None]


def _row(job: Path, found: dict[str, Any] | str, columns: Columns) -> Row:
    """One job's row; a job without a readable result is there too, and says so."""
    row: Row = {"job": int(job.name), "status": "unfinished", "error": "it left no result.json"}
    return row | _overrides(job) | ({"error": found} if isinstance(found, str) else _facts(found, columns))


def _facts(found: dict[str, Any], columns: Columns) -> Row:
    """What a row shows of a job's result.json."""
    plan = found["plan"] or {}

    def column(name: str, measured: dict[str, Any]) -> str:
        return columns.get(name, {}).get(protocol_of(measured), name)

    quality = quality_of(found["dense"])
    return {
        "status": found["status"],
        "error": found["error"] or "",
        "method": found["method"],
        "ratio_asked": plan.get("ratio_asked"),
        "ratio_reached": plan.get("ratio_reached"),
        "cache_hit": found["cache"]["hit"],
        "seconds": found["seconds"]["total"],
        "quality": column(quality, found["dense"][quality]) if quality else "",
        **{f"{s}_{column(name, measured)}": measured["value"] for s in SIDES for name, measured in found[s].items()},
    }


def _overrides(job: Path) -> Row:
    """What the job was given on the command line, by key."""
    try:
        written = (job / ".hydra" / "overrides.yaml").stat()
    except OSError:
        return {}
    pairs = (override.lstrip("+").partition("=") for override in _given(job, written.st_mtime_ns, written.st_size))
    return {key: value for key, _, value in pairs}


@lru_cache(maxsize=4096)
def _given(job: Path, mtime_ns: int, size: int) -> tuple[str, ...]:
    """A job's overrides as they are in its folder; read once for each time that they were written."""
    return tuple(given_to(job) or ())


def _columns(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(key for row in rows for key in row)
    return [*(c for c in FIXED if c in found), *(c for c in found if c not in FIXED)]


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _varied(rows: Sequence[Row]) -> list[str]:
    """The overrides that differ between jobs."""
    keys = [key for key in _columns(rows) if key not in FIXED and not key.startswith(("dense_", "pruned_"))]
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def _markdown(rows: Sequence[Row], pareto: bool, legend: Sequence[str]) -> str:
    measured = [c for c in _columns(rows) if c.startswith("pruned_")]
    metrics = [c for c in measured if any(row.get(c) is not None for row in rows)] or measured
    dense = _common_dense(rows, metrics)
    shown = metrics if dense else [side + m.removeprefix("pruned_") for m in metrics for side in ("dense_", "pruned_")]
    columns = ["job", "status", *_varied(rows), "ratio_reached", *shown, "seconds"]
    failed = [row for row in rows if row["status"] != "ok"]
    lines = [f"# Sweep of {len(rows)} jobs", ""]
    lines += [f"> **Job {row['job']} {row['status']}.** {_one_line(row['error'])}\n" for row in failed]
    lines += [f"| {' | '.join(columns)} |", f"|{'|'.join('--:' for _ in columns)}|"]
    lines += [f"| {' | '.join(_shown(row.get(column)) for column in columns)} |" for row in rows]
    values = ", ".join(
        f"{m.removeprefix('pruned_')} {_shown(dense.get(m.replace('pruned_', 'dense_')))}" for m in metrics
    )
    lines += ["", f"Dense: {values}.", ""] if dense else [""]
    if left_out := [m.removeprefix("pruned_") for m in measured if m not in metrics]:
        lines += [f"Without a figure in any job, for the reasons in their reports: {', '.join(left_out)}.", ""]
    lines += [line for entry in legend for line in (entry, "")]
    return "\n".join([*lines, "![Pareto](pareto.png)", ""] if pareto else lines)


def _common_dense(rows: Sequence[Row], metrics: Sequence[str]) -> Row:
    """The dense model's row if all jobs share it by quality and size; jobs of several models have none."""
    ok = [row for row in rows if row["status"] == "ok"]
    stable = [m.replace("pruned_", "dense_") for m in metrics if not m.removeprefix("pruned_").startswith(TIMED)]
    same = all(row.get(column) == ok[0].get(column) for row in ok for column in stable)
    return ok[0] if ok and same else {}


def _one_line(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _one_line(value)


def _draw_pareto(rows: Sequence[Row], path: Path) -> bool:
    """Draw quality against MACs, one line for each set of overrides other than the ratio."""
    points = [r for r in rows if _quality(r, "pruned") is not None and r.get("pruned_macs") is not None]
    if not points:
        return False
    from evals.pareto_plot import pareto, same_pareto_frame
    from evals.plots import save_figure

    others = [key for key in _varied(rows) if key != "prune.ratio"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in points:
        extra = [f"{key}={row.get(key, '')}" for key in others if key != "prune"]
        label = " ".join([str(row["method"]), *extra])
        lines.setdefault(label, []).append((row["pruned_macs"], _quality(row, "pruned")))
    dense = sorted({(row["dense_macs"], _quality(row, "dense")) for row in points})
    names = dict.fromkeys(str(row["quality"]) for row in points)
    quality = ", ".join(names)
    frame = same_pareto_frame([*dense, *(point for line in lines.values() for point in line)], quality)
    save_figure(pareto(lines, dense, quality, frame), path)
    return True


def _quality(row: Row, side: str) -> Any:
    """A job's own first metric of quality."""
    return row.get(f"{side}_{row.get('quality')}")


def main(arguments: Sequence[str]) -> int:
    """Rebuild a sweep's files: `python -m evals.report <sweep folder>`."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m evals.report <sweep folder>; the folder must exist", file=sys.stderr)
        return 2
    rows = rebuild(Path(arguments[0]))
    write_page(Path(arguments[0]))
    if not rows:
        print(f"{arguments[0]}: has no numbered job folders, so it is no sweep", file=sys.stderr)
        return 2
    print(f"{len(rows)} jobs, {sum(row['status'] != 'ok' for row in rows)} not ok: {Path(arguments[0]) / 'report.md'}")
    return 0
