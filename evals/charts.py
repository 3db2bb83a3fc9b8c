"""The charts of a page as plotly describes them: traces by the role of their colour, never by the colour itself.

A chart has views to choose from, so that many figures fit one place. Colours follow the page's
light or dark theme, which only its script knows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evals.values import PER_TEXT, quality_of

Result = Mapping[str, Any]
Chart = dict[str, Any]
View = dict[str, Any]
COSTS = ("macs", "params", "nonzero_params", "size", "latency", "peak_memory", "energy")


def charts_of(runs: Mapping[str, Result]) -> list[Chart]:
    """Every chart that the runs have figures for."""
    makers = (
        ("pareto", "Quality against cost", pareto),
        ("speed", "Speed-up over the dense model, with 95% interval", speed),
        ("layers", "Units kept in each layer", layers),
        ("scores", "Scores of the units in each layer", scores),
        ("tokens", "Tokens in each block", tokens),
        ("zeros", "Zeros in each block", zeros),
        ("time", "Where the time goes", time_by_kind),
        ("curves", "Learning curves", curves),
    )
    charts = [{"id": name, "title": title, "views": list(make(runs))} for name, title, make in makers]
    return [chart for chart in charts if chart["views"]]


def pareto(runs: Mapping[str, Result]) -> Iterator[View]:
    """Quality against each cost: one line a method, dense models marked; one view a cost."""
    quality = next((q for q in (quality_of(result["pruned"]) for result in runs.values()) if q), None)
    if quality is None:
        return
    perplexity = any(result["pruned"].get(quality, {}).get("unit") in PER_TEXT for result in runs.values())
    more = {"log_y": True} if perplexity else {}
    for cost in COSTS:
        lines: dict[str, list[tuple[float, float, str]]] = {}
        dense: dict[tuple[float, float], str] = {}
        for name, result in runs.items():
            if (point := _point(result["pruned"], cost, quality)) is not None:
                lines.setdefault(_line(result), []).append((*point, name))
            if (point := _point(result["dense"], cost, quality)) is not None:
                dense[point] = f"dense {result.get('model') or ''}"
        if lines:
            points = [(label, sorted(p), i) for i, (label, p) in enumerate(lines.items())]
            traces = [_scatter(label, p, f"series-{i}") for label, p, i in points]
            traces.append(_scatter("dense", [(*p, n) for p, n in dense.items()], "text", "markers", "star"))
            unit = next(r["pruned"][cost]["unit"] for r in runs.values() if cost in r["pruned"])
            yield _view(f"{quality} against {cost}", traces, f"{cost} ({unit})", quality, more)


def speed(runs: Mapping[str, Result]) -> Iterator[View]:
    """Speed-up of every timed figure: side by side for one run, a view each for several."""
    found = {
        name: [(run, r["pruned"][name]) for run, r in runs.items() if r["pruned"].get(name, {}).get("speedup")]
        for name in dict.fromkeys(name for r in runs.values() for name in r["pruned"])
    }
    found = {name: bars for name, bars in found.items() if bars}
    label = "times as fast as dense"
    if len(runs) == 1 and found:
        figures = [(name, measured) for name, ((_, measured),) in found.items()]
        yield _view("speed-up", [_gains("speed-up", figures)], "", label, {"showlegend": False, "line_at": 1})
        return
    for name, bars in found.items():
        yield _view(name, [_gains(name, bars)], "run", label, {"showlegend": False, "line_at": 1})


def _gains(name: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Bars of speed-ups with their intervals."""
    gains = [measured["speedup"] for _, measured in found]
    bounds = [m.get("speedup_interval") or (g, g) for (_, m), g in zip(found, gains, strict=True)]
    above, below = (
        [b[1] - g for b, g in zip(bounds, gains, strict=True)],
        [g - b[0] for b, g in zip(bounds, gains, strict=True)],
    )
    spread = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return _bars(name, [label for label, _ in found], gains, "series-0") | {"error_y": spread}


def layers(runs: Mapping[str, Result]) -> Iterator[View]:
    """Kept and removed units by layer: one view for each run and kind of unit."""
    for name, result in runs.items():
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for group in (result.get("plan") or {}).get("groups") or []:
            kinds.setdefault(group["kind"], []).append(group)
        for kind, groups in sorted(kinds.items(), key=lambda item: _share_kept(item[1])):  # the most cut one first
            at = [group["layer"] for group in groups]
            several = len(set(at)) < len(at)
            where = [group["name"] for group in groups] if several else at
            kept, gone = [g["kept"] for g in groups], [g["count"] - g["kept"] for g in groups]
            traces = [_bars("kept", where, kept, "series-0"), _bars("removed", where, gone, "muted")]
            yield _view(_named(runs, name, f"{kind}s"), traces, "layer", f"{kind}s", {"barmode": "stack"})


def _share_kept(groups: Sequence[Mapping[str, Any]]) -> float:
    return sum(g["kept"] for g in groups) / (sum(g["count"] for g in groups) or 1)


def scores(runs: Mapping[str, Result]) -> Iterator[View]:
    """Boxes of the scores of kept and removed units by layer: one view for each run, term and kind of unit."""
    for name, result in runs.items():
        rows = result.get("scores") or []
        for term, kind in dict.fromkeys((row["term"], row["kind"]) for row in rows):
            own = [row for row in rows if (row["term"], row["kind"]) == (term, kind)]
            several = len({row["layer"] for row in own}) < len(own)
            sides = (("kept", "series-0"), ("removed", "series-1"))
            boxes = [_boxes(side, own, "name" if several else "layer", role) for side, role in sides]
            what = f"{kind}s by {term}" if term != result.get("method") else f"{kind}s"
            more = {"boxmode": "group", "log_y": _wide([five for row in own for five in _fives(row)])}
            yield _view(_named(runs, name, what), [box for box in boxes if box["x"]], "layer", f"{term} score", more)


def _fives(row: Mapping[str, Any]) -> list[Sequence[float]]:
    return [row[side] for side in ("kept", "removed") if row[side]]


def _wide(fives: Sequence[Sequence[float]]) -> bool:
    """Whether scores are positive and spread over more than a factor of ten."""
    lowest, highest = min(five[0] for five in fives), max(five[-1] for five in fives)
    return 0 < 10 * lowest < highest


def _boxes(side: str, rows: Sequence[Mapping[str, Any]], at: str, role: str) -> dict[str, Any]:
    """One box a layer, from the least, the quartiles and the most."""
    there = [row for row in rows if row[side]]
    parts = zip(("lowerfence", "q1", "median", "q3", "upperfence"), range(5), strict=True)
    return {
        "type": "box", "name": side, "role": role, "x": [row[at] for row in there],
        **{part: [row[side][i] for row in there] for part, i in parts},
    }  # fmt: skip


def tokens(runs: Mapping[str, Result]) -> Iterator[View]:
    """Tokens that enter attention and MLP of each block, as planned, and where data decides also as measured."""
    for name, result in runs.items():
        rows = (result.get("plan") or {}).get("tokens") or []
        if rows:
            yield _view(_named(runs, name, "tokens"), _halves(rows), "block", "tokens", {"barmode": "group"})
        counted = (result["pruned"].get("macs") or {}).get("kept_tokens") or []
        if counted:
            what = "tokens of the validation samples, with the 95th percentile"
            yield _view(_named(runs, name, what), _halves(counted), "block", "tokens", {"barmode": "group"})


def _halves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bars for attention and MLP of each block; with a line up to the 95th percentile where counts are spread."""
    traces = []
    for number, half in enumerate(("attention", "mlp")):
        found = [row[half] for row in rows]
        means = [one["mean"] if isinstance(one, Mapping) else one for one in found]
        bars = _bars(half, [row["layer"] for row in rows], means, f"series-{number}")
        if isinstance(found[0], Mapping):
            above = [max(0.0, one["p95"] - one["mean"]) for one in found]
            bars |= {"error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": [0] * len(above)}}
        traces.append(bars)
    return traces


def zeros(runs: Mapping[str, Result]) -> Iterator[View]:
    """Share of zeros in the weights of each block."""
    for name, result in runs.items():
        totals: dict[int, list[int]] = {}
        for row in (result.get("plan") or {}).get("matrices") or []:
            sums = totals.setdefault(row["layer"], [0, 0])
            sums[0] += row["zeros"]
            sums[1] += row["count"]
        if totals:
            shares = [100 * zero / count if count else 0 for zero, count in totals.values()]
            bars = _bars("zeros", list(totals), shares, "series-0")
            yield _view(_named(runs, name, "zeros"), [bars], "block", "% of the weights", {"showlegend": False})


def time_by_kind(runs: Mapping[str, Result]) -> Iterator[View]:
    """Time of one pass by kind of operator, dense beside pruned, stacked."""
    for name, result in runs.items():
        sides = {side: (result[side].get("profile") or {}).get("kinds") or {} for side in ("dense", "pruned")}
        kinds = list(dict.fromkeys(kind for found in sides.values() for kind in found))
        traces = [
            _bars(kind, list(sides), [found.get(kind, 0.0) for found in sides.values()], f"series-{i}")
            for i, kind in enumerate(kinds)
        ]
        if traces:
            yield _view(_named(runs, name, "time"), traces, "", "ms of one pass", {"barmode": "stack"})


def curves(runs: Mapping[str, Result]) -> Iterator[View]:
    """Training of the dense model and recovery of the pruned one."""
    for name, result in runs.items():
        recovery = (result.get("recovery") or {}).get("history") or []
        for what, rows in (("training of the dense model", result.get("history") or []), ("recovery", recovery)):
            names = [n for n in (rows[-1] if rows else {}) if n not in ("epoch", "learning_rate")]
            traces = [
                _scatter(n.replace("_", " "), [(r["epoch"], r[n], "") for r in rows if n in r], f"series-{i}", "lines")
                for i, n in enumerate(names)
            ]
            if traces:
                yield _view(_named(runs, name, what), traces, "epoch", "value")


def _point(found: Mapping[str, Any], cost: str, quality: str) -> tuple[float, float] | None:
    x, y = (found.get(name, {}).get("value") for name in (cost, quality))
    return None if x is None or y is None else (x, y)


def _line(result: Result) -> str:
    model = result.get("model")
    recovery = (result.get("recovery") or {}).get("method")
    return " ".join(
        filter(None, (str(result.get("method") or "run"), f"+ {recovery}" if recovery else "", model or ""))
    )


def _named(runs: Mapping[str, Result], name: str, what: str) -> str:
    return f"{name}: {what}" if len(runs) > 1 else what


def _scatter(
    name: str,
    points: Sequence[tuple[float, float, str]],
    role: str,
    mode: str = "lines+markers",
    symbol: str = "circle",
) -> dict[str, Any]:
    xs, ys, texts = ([p[i] for p in points] for i in range(3))
    marker = {"symbol": symbol, "size": 13 if symbol == "star" else 8}
    return {
        "type": "scatter", "mode": mode, "x": xs, "y": ys, "text": texts, "name": name, "role": role, "marker": marker,
    }  # fmt: skip


def _bars(name: str, x: Sequence[Any], y: Sequence[float], role: str) -> dict[str, Any]:
    narrow = {"width": 0.4} if len(x) <= 2 else {}  # one or two bars need not fill the place
    return {"type": "bar", "x": list(x), "y": list(y), "name": name, "role": role, **narrow}


def _view(
    name: str, traces: Sequence[Mapping[str, Any]], x: str, y: str, more: Mapping[str, Any] | None = None
) -> View:
    return {"name": name, "traces": list(traces), "x": x, "y": y, "layout": dict(more or {})}
