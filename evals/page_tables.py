"""The tables of a page: what was measured and how, run beside run, and where the figures come from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from evals.values import change, prefixed, shown, unit_of

Result = Mapping[str, Any]
Cell = str | tuple[str, float | None]
NOTHING: Mapping[str, Any] = {}


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], numeric: Sequence[bool]) -> str:
    """A table that sorts by a click on a heading; a cell may come with the number that it sorts by."""
    head = "".join(
        f"<th class='{'number' if n else 'text'}' aria-sort='none'><button>{escape(h)}</button></th>"
        for h, n in zip(headings, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: Cell, number: bool) -> str:
    text, value = cell if isinstance(cell, tuple) else (cell, None)
    sort = f" data-value='{value!r}'" if value is not None else ""
    kind = ("number reason" if text.startswith("n/a (") else "number") if number else "text"
    return f"<td class='{kind}'{sort}>{escape(text)}</td>"


def measured_table(result: Result) -> str:
    """One run: every figure dense and pruned, its unit, whether it was measured, and how."""
    rows = []
    for name, after in result["pruned"].items():
        before = result["dense"].get(name, NOTHING)
        rows.append(
            (
                name,
                (shown(before), before.get("value")),
                (shown(after), after.get("value")),
                (change(before, after), _relative(before, after)),
                unit_of(after),
                _status(after),
                after.get("how") or "",
            )
        )
    headings = ("metric", "dense", "pruned", "change", "unit", "status", "how it was measured")
    numeric = (False, True, True, True, False, False, False)
    command = f"<pre>{escape(result.get('command') or '')}</pre>"
    if not rows:
        return f"{command}<p>Nothing was measured.</p>"
    return f"{command}<p>{escape(_what(result))}</p><h2>Dense and pruned</h2>{table(headings, rows, numeric)}"


def _what(result: Result) -> str:
    plan = result.get("plan") or NOTHING
    data = (result.get("data") or NOTHING).get("name") or "its data"
    model = result.get("model") or "the model"
    if plan.get("budget") is None:
        return f"{model} on {data}; nothing was removed."
    return (
        f"{model} on {data}, pruned by {result['method']}: {plan['ratio_asked']:.1%} of the {plan['budget']} were to "
        f"go, {plan['ratio_reached']:.2%} went."
    )


def _relative(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    if after.get("speedup") is not None:
        return after["speedup"] - 1
    values = before.get("value"), after.get("value")
    return None if None in values or not values[0] else values[1] / values[0] - 1


def _status(found: Mapping[str, Any]) -> str:
    return str(found.get("status") or ("measured" if found.get("value") is not None else "null"))


def runs_table(runs: Mapping[str, Result]) -> str:
    """Several runs, one row each, with the figures of the pruned models; the dense ones come first."""
    names = list(dict.fromkeys(name for result in runs.values() for name in result["pruned"]))
    units = {n: next(unit_of(r["pruned"][n]) for r in runs.values() if n in r["pruned"]) for n in names}
    headings = ("run", "model", "method", "removed", "status", *(f"{n} ({units[n]})" for n in names), "speed-up")
    rows: list[Sequence[Cell]] = []
    dense: dict[str, None] = {}
    for result in runs.values():  # a dense model that all share stands there once
        figures = {n: f for n in names if not _measured_anew(f := result["dense"].get(n, NOTHING))}
        key = json.dumps([result.get("model"), {n: f.get("value") for n, f in figures.items()}], sort_keys=True)
        if result["dense"] and key not in dense:
            dense[key] = None
            rows.append(_run_row("dense", result, "dense", names))
    rows += [_run_row(name, result, "pruned", names) for name, result in runs.items()]
    numeric = (False, False, False, True, False, *(True for _ in names), True)
    return f"<h2>All runs</h2>{table(headings, rows, numeric)}"


def _measured_anew(found: Mapping[str, Any]) -> bool:
    """Whether it is a time or an energy, which differs from run to run of the same model."""
    return "speedup" in found or str(found.get("unit")).startswith(("J/", "kg/"))


def _run_row(name: str, result: Result, side: str, names: Sequence[str]) -> Sequence[Cell]:
    plan = result.get("plan") or NOTHING
    gone = plan.get("ratio_reached") if side == "pruned" and plan.get("budget") else None
    removed: Cell = (f"{gone:.1%} of {plan['budget']}", gone) if gone is not None else ""
    found = [result[side].get(metric, NOTHING) for metric in names]
    gain = result[side].get("latency", result[side].get("throughput", NOTHING)).get("speedup")
    status = result.get("status") or "" if side == "pruned" else ""
    method = str(result.get("method") or "") if side == "pruned" else ""
    return (
        name,
        str(result.get("model") or ""),
        method,
        removed,
        status,
        *((shown(f), f.get("value")) for f in found),
        (f"{gain:.2f}x" if gain is not None else "", gain),
    )


def comparison_table(runs: Mapping[str, Result]) -> str:
    """How each figure of several runs was measured, once where all did alike."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for run, result in runs.items():
        for name, found in result["pruned"].items():
            rows.setdefault((name, unit_of(found), f"{_status(found)}|{found.get('how') or ''}"), []).append(run)
    cells = [
        (name, unit, how.partition("|")[0], how.partition("|")[2], "all" if len(of) == len(runs) else ", ".join(of))
        for (name, unit, how), of in rows.items()
    ]
    headings = ("metric", "unit", "status", "how it was measured", "runs")
    return f"<h2>How it was measured</h2>{table(headings, cells, (False,) * 5)}" if cells else ""


def provenance(runs: Mapping[str, Result]) -> str:
    """Device, versions, fingerprints and configuration of each run, folded away."""
    parts = []
    for name, result in runs.items():
        rows = [(key, prefixed(value)) for key, value in _facts(result)]
        shown_config = escape(json.dumps(result.get("config"), indent=1, ensure_ascii=False))
        parts.append(
            f"<details><summary>{escape(name)}</summary>{table(('what', 'value'), rows, (False, False))}"
            f"<pre>{shown_config}</pre></details>"
        )
    return f"<h2>Where the figures come from</h2>{''.join(parts)}"


def _facts(result: Result) -> Iterable[tuple[str, Any]]:
    yield "command", result.get("command")
    yield "config hash", result.get("config_hash")
    for part in ("device", "environment", "versions", "fingerprints", "seconds"):
        for key, value in (result.get(part) or {}).items():
            yield f"{part}: {key}", value
