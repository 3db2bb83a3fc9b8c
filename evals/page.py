"""One self-contained page about one run or several: opens from disk, needs no network.

Works on the plain values of result.json; nothing here needs torch. The charts are drawn by
plotly's own script, which is part of the page: packed, since a sweep has a page a job.
"""

import gzip
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evals.charts import charts_of
from evals.class_table import HEADINGS, class_rows
from evals.page_tables import comparison_table, measured_table, provenance, runs_table, table
from evals.page_texts import texts_section
from evals.protocols import apart

Result = Mapping[str, Any]
PARTS = Path(__file__).parent / "page_parts"
NO_PICTURES: Mapping[str, bytes] = MappingProxyType({})
NO_CHARTS = "Charts are left out: the package plotly is not installed (pip install -r requirements.txt)."


def page(
    title: str, runs: Mapping[str, Result], warnings: Sequence[str] = (), pictures: Mapping[str, bytes] = NO_PICTURES
) -> str:
    """The page as HTML.

    Args:
        title: Its heading.
        runs: Contents of result.json by the name that each run goes by.
        warnings: What stands on top before the runs' own warnings.
        pictures: PNGs by their paths, to be part of the page.
    """
    runs = apart(runs)
    drawn = charts_of(runs)
    notes = [*warnings, *_warnings(runs), *([] if _plotly() or not drawn else [NO_CHARTS])]
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="warning">{escape(note)}</p>' for note in notes), _single(runs)]
    body += [runs_table(runs) if len(runs) > 1 else _single_table(runs)]
    body += [_picture(path, content) for path, content in pictures.items()]
    body += [f"<section class='charts'>{''.join(map(_place, drawn))}</section>" if drawn and _plotly() else ""]
    body += [texts_section(runs), comparison_table(runs) if len(runs) > 1 else "", provenance(runs) if runs else ""]
    return _document(title, "\n".join(body), drawn if _plotly() else [])


def _warnings(runs: Mapping[str, Result]) -> list[str]:
    """The warnings that hold for all runs, each once."""
    return [note for note, names in _named(runs).items() if len(names) == len(runs)]


def _single(runs: Mapping[str, Result]) -> str:
    """The warnings on some of the runs, with their names, folded into one place."""
    some = {note: names for note, names in _named(runs).items() if len(names) < len(runs)}
    items = "".join(f"<li>{escape(', '.join(names))}: {escape(note)}</li>" for note, names in some.items())
    summary = f"{len(some)} {'warnings' if len(some) > 1 else 'warning'} on single runs"
    return f"<details class='warning'><summary>{summary}</summary><ul>{items}</ul></details>" if some else ""


def _named(runs: Mapping[str, Result]) -> dict[str, list[str]]:
    """The names of the runs that each warning is on."""
    named: dict[str, list[str]] = {}
    for name, result in runs.items():
        for note in result.get("warnings") or []:
            named.setdefault(note, []).append(name)
    return named


def _single_table(runs: Mapping[str, Result]) -> str:
    for result in runs.values():
        return measured_table(result) + _class_table(result)
    return "<p>No run left a result.</p>"


def _class_table(result: Result) -> str:
    """The IoU of each class, where that was measured."""
    rows = class_rows(result["dense"], result["pruned"])
    return f"<h2>IoU of each class</h2>{table(HEADINGS, rows, (False, True, True, True))}" if rows else ""


def _picture(path: str, content: bytes) -> str:
    """A picture as part of the page: it must open from wherever the page lies."""
    name = escape(Path(path).stem.replace("_", " "))
    image = f"<img alt='{name}' src='data:image/png;base64,{b64encode(content).decode()}'>"
    return f"<figure class='picture'><figcaption>{name}</figcaption>{image}</figure>"


def _place(chart: Mapping[str, Any]) -> str:
    """Where a chart is drawn; with a choice where it has several views."""
    views = chart["views"]
    options = "".join(f"<option>{escape(view['name'])}</option>" for view in views)
    choice = f"<select aria-label='{escape(chart['title'])}'>{options}</select>" if len(views) > 1 else ""
    return (
        f"<figure id='{chart['id']}'><figcaption>{escape(chart['title'])} {choice}</figcaption>"
        "<div class='plot'></div></figure>"
    )


def _document(title: str, body: str, charts: Sequence[Mapping[str, Any]]) -> str:
    style, script = (_part(name) for name in ("style.css", "script.js"))
    # a closing tag in a name would end the script that holds the data
    data = json.dumps(charts).replace("<", "\\u003c")
    library = f'<script type="application/gzip" id="library">{_plotly()}</script>' if charts else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}\n</main>\n"
        f'<script type="application/json" id="charts">{data}</script>\n{library}\n<script>{script}</script>\n'
        "</body></html>\n"
    )


@lru_cache(maxsize=4)
def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _plotly() -> str:
    """Plotly's script, packed, as text; empty where there is none.

    The package is not imported for it, which would take a second.
    """
    found = find_spec("plotly")
    places = found.submodule_search_locations if found else None
    path = Path(places[0]) / "package_data" / "plotly.min.js" if places else None
    return b64encode(gzip.compress(path.read_bytes(), 6, mtime=0)).decode() if path and path.is_file() else ""
