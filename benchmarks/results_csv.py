"""The rows of docs/results/<model>.csv, made of runs: `python -m benchmarks.results_csv FILE RUN...`.

A RUN is a folder with a result.json, or a sweep's folder, which stands for its jobs. Runs whose commands differ in the
seed alone become one row: their mean, with the standard error over them. Rows of the same command replace those that
FILE has; all others stay.
"""

import argparse
import csv
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from evals.compare import jobs_of, read_result
from utils.errors import InputError
from utils.files import write_atomically

METRICS = ("accuracy", "perplexity")
SEEDS = ("seed=", "data.calibration_seed=")
# settings that are in the command, and are not part of a method's name
UNNAMED = ("ratio", "seed", "learning_rate", "weight_decay")
DROPPED = ("storage=", "hydra.", "name=")
# what takes less was nothing but looking up
DONE_S = 1.0
TRACKS = ("dense", "units", "tokens", "both", "weights", "recovered")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one method.

    Attributes:
        model: Whose.
        method: In words.
        track: What goes: units, weights (zeros), tokens, both (units and tokens); recovered: trained afterwards.
        removed: Share asked of what `track` says goes: of the MACs, for weights of the weights.
        macs: Executed MACs as a part of the dense model's.
        metric: `accuracy` (a fraction) or `perplexity`.
        value: The figure; the mean where there are several seeds.
        standard_error: Of the mean over the seeds; for one seed that of a share of `n` samples; None: not known.
        n: Samples, or chunks of text, that were answered.
        seeds: Which, with spaces between.
        rank_s, repair_s, train_s: Wall seconds, where something was done and timed.
        joules: Of ranking, repairing and recovering together; None: not known.
        joules_status: `measured` or `estimated`, where there are some.
        command: What to type to repeat it.
    """

    model: str
    method: str
    track: str
    removed: float
    macs: float
    metric: str
    value: float
    standard_error: float | None = None
    n: int
    seeds: str = "0"
    rank_s: float | None = None
    repair_s: float | None = None
    train_s: float | None = None
    joules: float | None = None
    joules_status: str = ""
    command: str


NUMBERS = ("removed", "macs", "value", "standard_error", "rank_s", "repair_s", "train_s", "joules")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        InputError: If a column is missing, or a cell is no number where one must be.
    """
    names = [field.name for field in fields(Row)]
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if table.fieldnames is None or [*table.fieldnames] != names:
            raise InputError(f"{path}: the columns must be {', '.join(names)}; they are {table.fieldnames}")
        return [_row(path, number, cells) for number, cells in enumerate(table, start=2)]


def _row(path: Path, number: int, cells: Mapping[str, str]) -> Row:
    try:
        values = {name: (float(cells[name]) if cells[name] else None) for name in NUMBERS}
        row = Row(**{**cells, **values, "n": int(cells["n"])})  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: line {number} can't be read: {error}") from error
    if row.track not in TRACKS or row.metric not in METRICS or None in (row.removed, row.macs, row.value):
        raise InputError(
            f"{path}: line {number}: track={row.track} must be one of {', '.join(TRACKS)}, metric={row.metric} one of "
            f"{', '.join(METRICS)}, and removed, macs and value must be numbers"
        )
    return row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file, in the order of tracks, methods as they come, and ratios."""
    rows = list(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    ordered = sorted(rows, key=lambda r: (TRACKS.index(r.track), methods.index(r.method), r.removed))
    lines = [[_cell(value) for value in asdict(row).values()] for row in ordered]
    text = [[field.name for field in fields(Row)], *lines]
    content = "\n".join(",".join(_quoted(cell) for cell in line) for line in text) + "\n"
    write_atomically(path, content.encode())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(mark in cell for mark in ',"\n') else cell


def row_of(result: Mapping[str, Any], model: str) -> Row:
    """A run's result as a row.

    Raises:
        InputError: If it has no accuracy, perplexity, or MACs.
    """
    pruned, plan = result["pruned"], result.get("plan") or {}
    metric = next((name for name in METRICS if pruned.get(name, {}).get("value") is not None), None)
    if result["status"] != "ok" or metric is None or pruned.get("macs", {}).get("value") is None:
        raise InputError(f"{result['command']}: a row needs a finished run with macs and {' or '.join(METRICS)}")
    figure, seconds, recovery = pruned[metric], result["seconds"], result.get("recovery")
    joules, status = _joules(result)
    ranked = seconds["rank"] >= DONE_S and not result["cache"]["hit"]
    repaired = seconds["cut"] >= DONE_S and result["config"]["prune"].get("repair")
    return Row(
        model=model, method=_method(result), track=_track(result), removed=plan.get("ratio_asked", 0.0),
        macs=pruned["macs"]["value"] / result["dense"]["macs"]["value"], metric=metric, value=figure["value"],
        standard_error=figure.get("standard_error"), n=figure.get("samples") or figure.get("chunks") or 0,
        seeds=_seed(result), rank_s=seconds["rank"] if ranked else None,
        repair_s=seconds["cut"] if repaired else None,
        train_s=recovery["seconds"] if recovery else None, joules=joules, joules_status=status,
        command=portable(result["command"]),
    )  # fmt: skip


def _joules(result: Mapping[str, Any]) -> tuple[float | None, str]:
    """What ranking, cutting and recovering took; none where a part is not known that took a second or more."""
    found = result.get("joules") or {}
    parts = [found.get(phase, {}) for phase in ("rank", "cut", "recover")]
    known = [part for part in parts if part.get("value") is not None]
    missing = [p for p in ("rank", "cut", "recover") if (found.get(p) or {}).get("value") is None]
    if not known or any(result["seconds"][phase] >= 1 for phase in missing):
        return None, ""
    return sum(part["value"] for part in known), known[0]["status"]


def _words(command: str) -> list[str]:
    return shlex.split(command)


def _method(result: Mapping[str, Any]) -> str:
    """The method and what was set of it beside the ratio, then the recovery in the same way."""
    recovery, words = result.get("recovery"), _words(portable(result["command"]))
    parts = [("prune.", result["method"])] + ([("recover.", recovery["method"])] if recovery else [])
    return " + ".join(", ".join([name, *_settings(words, group)]) for group, name in parts)


def _settings(words: Sequence[str], group: str) -> list[str]:
    found = [word.removeprefix(group) for word in words if word.startswith(group)]
    return [word for word in found if word.partition("=")[0] not in UNNAMED]


def _track(result: Mapping[str, Any]) -> str:
    plan = result.get("plan") or {}
    if not plan.get("budget"):
        return "dense"
    if result.get("recovery"):
        return "recovered"
    if plan.get("matrices"):
        return "weights"
    cut = any(group["kept"] < group["count"] for group in plan["groups"])
    return ("both" if cut else "tokens") if plan.get("tokens") else "units"


def _seed(result: Mapping[str, Any]) -> str:
    given = [word.partition("=")[2] for word in _words(result["command"]) if word.startswith(SEEDS)]
    return given[-1] if given else str(result["seed"])


def portable(command: str) -> str:
    """A command with data below `$PARE_DATA`, and without what says where things are kept."""
    root = Path(os.environ.get("PARE_DATA", "../shared/data")).absolute()
    words = [word for word in _words(command) if not word.startswith(DROPPED)]
    plain = [word.replace(f"{root}/", "$PARE_DATA/") for word in words]
    plain = [f"{word[:-5]}{word[-5:].lower()}" if word.endswith(("=True", "=False")) else word for word in plain]
    return " ".join(f"'{word}'" if re.search(r"[\[\]*{}() ]", word) else word for word in plain)


def of_all_seeds(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in the seed alone as one: mean, and standard error of the mean over the seeds."""
    alike: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        words = [word for word in row.command.split(" ") if not word.startswith(SEEDS)]
        alike.setdefault((row.method, row.removed, " ".join(words)), []).append(row)
    return [found[0] if len(found) == 1 else _joined(found, words) for (_, _, words), found in alike.items()]


def _joined(rows: Sequence[Row], words: str) -> Row:
    rows = sorted(rows, key=lambda row: int(row.seeds))
    values, seeds = [row.value for row in rows], [row.seeds for row in rows]
    seeded = [word for row in rows for word in row.command.split(" ") if word.startswith(SEEDS)]
    name = seeded[0].partition("=")[0] if seeded else "seed"
    means = {key: _mean([getattr(row, key) for row in rows]) for key in ("rank_s", "repair_s", "train_s", "joules")}
    return replace(
        rows[0], value=statistics.fmean(values), seeds=" ".join(seeds), macs=statistics.fmean(r.macs for r in rows),
        standard_error=statistics.stdev(values) / math.sqrt(len(values)),
        command=words.replace("main.py", f"main.py -m {name}={','.join(seeds)}", 1), **means,
    )  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 if a run has no row in it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results_csv", description="Rows of runs into a table.")
    parser.add_argument("file", type=Path, help="docs/results/<model>.csv")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    given = parser.parse_args(arguments)
    try:
        results = [read_result(job) for folder in given.runs for job in jobs_of(folder)]
        found = of_all_seeds([row_of(result, given.file.stem) for result in results])
        before = read_rows(given.file) if given.file.exists() else []
        replaced = {(row.method, row.removed) for row in found}
        write_rows(given.file, [*(r for r in before if (r.method, r.removed) not in replaced), *found])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.file}: {len(found)} rows from {len(results)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
