"""Any runs side by side in one report: `python -m evals.compare RUN RUN ... [--out FOLDER] [--other-calibration]`.

A RUN is a folder with a result.json, or a sweep's folder, which stands for its jobs. Runs that must not be
compared (other data, other protocols) are refused, and the difference is named.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.page import page
from evals.protocols import differing
from evals.values import change, finite, shown, unit_of
from utils.errors import InputError
from utils.files import write_atomically

Result = dict[str, Any]
NEEDED = ("status", "config", "config_hash", "environment", "fingerprints", "dense", "pruned", "versions", "device")
MAPPINGS = ("config", "environment", "fingerprints", "dense", "pruned", "versions", "device")


def compare(folders: Sequence[Path], out: Path, other_calibration: bool = False) -> dict[str, Result]:
    """Write report.html and report.md about several runs into `out`.

    Args:
        folders: Run folders and sweep folders.
        out: Where the report goes; made if it is not there.
        other_calibration: Whether runs may differ in their training and calibration data, as long as they are
            validated on the same.

    Returns:
        The runs' results by the names that the report calls them.

    Raises:
        InputError: If a folder holds no readable result, or runs must not be compared.
    """
    runs = named([job for folder in folders for job in jobs_of(folder)])
    if len(runs) < 2:
        raise InputError(f"evals.compare: found {len(runs)} run; a comparison needs two at least")
    (first_name, first), *others = runs.items()
    for name, other in others:
        if problems := differences(first, other, other_calibration):
            raise InputError(
                f"evals.compare: {first_name} and {name} must not be compared:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )
    out.mkdir(parents=True, exist_ok=True)
    notes = [f"{name} {result['status']}: {result.get('error')}" for name, result in runs.items() if not _ok(result)]
    title = f"Comparison of {len(runs)} runs"
    write_atomically(out / "report.html", page(title, runs, notes).encode(), synced=False)
    write_atomically(out / "report.md", _markdown(title, runs, notes).encode(), synced=False)
    return runs


def jobs_of(folder: Path) -> list[Path]:
    """The run folder itself, or the jobs of a sweep."""
    if (folder / "result.json").is_file():
        return [folder]
    jobs = (
        [p for p in folder.iterdir() if p.name.isdigit() and (p / "result.json").is_file()] if folder.is_dir() else []
    )
    if not jobs:
        raise InputError(f"evals.compare: {folder}: must be the folder of a run or of a sweep; it has no result.json")
    return sorted(jobs, key=lambda job: int(job.name))


def read_result(folder: Path) -> Result:
    """A run's result.

    Raises:
        InputError: If it is damaged, or from before configuration and machine were kept with the figures.
    """
    try:
        found = finite(json.loads((folder / "result.json").read_text(encoding="utf-8")))
        missing = [key for key in NEEDED if key not in found]
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"evals.compare: {folder}/result.json is damaged ({error!r})") from error
    if missing:
        raise InputError(f"evals.compare: {folder}/result.json has no {', '.join(missing)}; run it again")
    if odd := misshapen(found):
        raise InputError(f"evals.compare: {folder}/result.json is damaged: {odd}")
    return found


def misshapen(found: Result) -> str | None:
    """What part of a result is of another kind than a run leaves; None if there is none."""
    mappings = {**{key: found[key] for key in MAPPINGS}, **{key: found.get(key) or {} for key in ("plan", "data")}}
    mappings["config: evals"] = mappings["config"].get("evals") or {} if isinstance(mappings["config"], dict) else {}
    for side in ("dense", "pruned"):
        inner = found[side].items() if isinstance(found[side], dict) else ()
        mappings |= {f"{side}: {name}": measured for name, measured in inner}
    odd = next((key for key, value in mappings.items() if not isinstance(value, dict)), None)
    if odd is not None:
        return f"{odd} must hold values by name"
    return None if "data" in found["fingerprints"] else "fingerprints must name the data"


def named(folders: Sequence[Path]) -> dict[str, Result]:
    """Results under short names that tell them apart: experiment, method and ratio, then the folder."""
    results = [(folder, read_result(folder)) for folder in folders]
    names = [_short(result) for _, result in results]
    unique = [
        name if names.count(name) == 1 else f"{name} ({'/'.join(folder.absolute().parts[-2:])})"
        for name, (folder, _) in zip(names, results, strict=True)
    ]
    if len(set(unique)) < len(unique):
        unique = [f"{name} [{number}]" for number, name in enumerate(unique, 1)]
    return {name: result for name, (_, result) in zip(unique, results, strict=True)}


def _short(result: Result) -> str:
    plan = result.get("plan") or {}
    asked = f" {plan['ratio_asked']:.0%}" if plan.get("budget") else ""
    return f"{result.get('name')}: {result.get('method')}{asked}"


def differences(first: Result, other: Result, other_calibration: bool = False) -> list[str]:
    """Why two runs must not be compared, in words; empty if they may.

    Data: the fingerprints must be equal. Protocols: what the two have both measured must have been measured with the
    same settings, and times on the same device with the same threads, type of numbers and version of torch.
    """
    shared = [name for name in first["pruned"] if name in other["pruned"]]
    timed = any("speedup" in first["pruned"][name] for name in shared)
    found = _data(first, other, other_calibration)
    found += [
        f"{name}: measured by different protocols: {reason}"
        for name in shared
        if (reason := differing(first["pruned"][name], other["pruned"][name]))
    ]
    found += _settings(first, other)
    return found + (_machines(first, other) if timed else [])


def _data(first: Result, other: Result, other_calibration: bool) -> list[str]:
    if not (_measured(first) and _measured(other)) or first["fingerprints"]["data"] == other["fingerprints"]["data"]:
        return []
    ours, theirs = ((result.get("data") or {}).get("fingerprints") or {} for result in (first, other))
    parts = [part for part in {**ours, **theirs} if ours.get(part) != theirs.get(part)]
    if other_calibration and parts and "validation" not in parts:
        return []
    names = [(result.get("data") or {}).get("name") for result in (first, other)]
    hint = "; --other-calibration allows it" if parts and "validation" not in parts else ""
    which = f"other {' and '.join(parts)} data{hint}" if parts else "another fingerprint"
    hashes = " against ".join(str(result["fingerprints"]["data"])[:16] for result in (first, other))
    return [f"data: {names[0]} against {names[1]}: {which} ({hashes})"]


def _settings(first: Result, other: Result) -> list[str]:
    """Settings of metrics that both runs have used, key by key."""
    ours, theirs = (result["config"].get("evals") or {} for result in (first, other))
    return [
        f"evals.{metric}.{key}: {_plain(ours[metric].get(key))} against {_plain(theirs[metric].get(key))}"
        for metric in ours
        if metric in theirs and isinstance(ours[metric], Mapping) and isinstance(theirs[metric], Mapping)
        for key in {**ours[metric], **theirs[metric]}
        if ours[metric].get(key) != theirs[metric].get(key)
    ]


def _machines(first: Result, other: Result) -> list[str]:
    """What times depend on beside the code."""
    kinds = (
        ("device", lambda r: f"{r['device'].get('type')} {r['device'].get('name')}"),
        ("CPU threads", lambda r: r["device"].get("cpu_threads")),
        ("dtype", lambda r: r["environment"].get("dtype")),
        ("torch", lambda r: r["versions"].get("torch")),
        ("TF32", lambda r: r["environment"].get("tf32_matmul")),
    )
    pairs = ((name, of(first), of(other)) for name, of in kinds)
    return [f"{name}: {a} against {b}; times don't compare" for name, a, b in pairs if a != b]


def _measured(result: Result) -> bool:
    return bool(result["pruned"])


def _ok(result: Result) -> bool:
    return result["status"] == "ok"


def _plain(value: object) -> str:
    return json.dumps(value)


def _markdown(title: str, runs: Mapping[str, Result], notes: Sequence[str]) -> str:
    """The same comparison as text: one row a run, pruned figures with their change from the dense model's."""
    metrics = list(dict.fromkeys(name for result in runs.values() for name in result["pruned"]))
    units = {m: next(unit_of(r["pruned"][m]) for r in runs.values() if m in r["pruned"]) for m in metrics}
    lines = [f"# {title}", "", *(f"> **Note.** {note}\n" for note in notes)]
    lines += [f"> **Note.** {name}: {note}\n" for name, result in runs.items() for note in result.get("warnings") or []]
    lines += [f"| run | {' | '.join(f'{m} ({units[m]})' for m in metrics)} |", f"|---|{'--:|' * len(metrics)}"]
    lines += [f"| {name} | {' | '.join(_cell(result, m) for m in metrics)} |" for name, result in runs.items()]
    hows = dict.fromkeys((m, f.get("how")) for r in runs.values() for m, f in r["pruned"].items() if f.get("how"))
    return "\n".join([*lines, "", *(f"- `{name}`: {how}" for name, how in hows)]) + "\n"


def _cell(result: Result, metric: str) -> str:
    if metric not in result["pruned"]:
        return ""
    before, after = result["dense"].get(metric, {}), result["pruned"][metric]
    changed = change(before, after)
    return f"{shown(after)} ({changed})" if changed else shown(after)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m evals.compare", description="Put runs into one report.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="where the report goes (comparison/)")
    parser.add_argument(
        "--other-calibration", action="store_true", help="allow other training and calibration data, same validation"
    )
    given = parser.parse_args(arguments)
    try:
        runs = compare(given.runs, given.out, given.other_calibration)
    except (InputError, OSError) as error:
        print(error if isinstance(error, InputError) else f"--out={given.out}: {error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs: {given.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
