"""What models wrote, on a page: every prompt with each model's continuation of it, side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evals.texts import COUNTED

Result = Mapping[str, Any]
Measured = Mapping[str, Mapping[str, Any]]


def texts_section(runs: Mapping[str, Result]) -> str:
    """All prompts of one run, the first one of several that continue the same; empty where nothing was written.

    Args:
        runs: Contents of result.json by the name that each run goes by.
    """
    first = next(iter(runs.values()), {})
    asked = _prompts(first.get("dense") or {})
    if not asked:
        return ""
    alike = {name: run for name, run in runs.items() if _prompts(run.get("dense") or {}) == asked}
    models: dict[str, Measured] = {"dense": first["dense"]}
    models |= {name if len(runs) > 1 else "pruned": run["pruned"] for name, run in alike.items()}
    shown = asked if len(runs) == 1 else asked[:1]
    return f"<h2>What they write</h2>{''.join(_table(models, number, text) for number, text in enumerate(shown))}"


def _prompts(measured: Measured) -> list[str]:
    found = next((figure["continuations"] for figure in measured.values() if figure.get("continuations")), [])
    return [str(text["prompt"]) for text in found]


def _table(models: Mapping[str, Measured], number: int, prompt: str) -> str:
    """One row a model and a way of choosing tokens."""
    names = ("model", "tokens", "continuation", *(words for _, words in COUNTED))
    head = "".join(f"<th class='plain'>{escape(name)}</th>" for name in names)
    rows = "".join(_row(model, figure, mode, number) for model, figure, mode in _figures(models))
    return (
        f"<p class='written'>{escape(prompt)}</p>"
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figures(models: Mapping[str, Measured]) -> list[tuple[str, Sequence[Mapping[str, Any]], str]]:
    """Model, continuations and mode, by mode."""
    modes = dict.fromkeys(n for measured in models.values() for n, f in measured.items() if f.get("continuations"))
    return [
        (model, measured[name]["continuations"], name.removesuffix("_perplexity"))
        for name in modes
        for model, measured in models.items()
        if measured.get(name, {}).get("continuations")
    ]


def _row(model: str, texts: Sequence[Mapping[str, Any]], mode: str, number: int) -> str:
    if number >= len(texts):
        return ""
    text = texts[number]
    counts = (text.get(key) for key, _ in COUNTED)
    cells = "".join(f"<td class='number'>{format(c, '.3g') if isinstance(c, int | float) else ''}</td>" for c in counts)
    return (
        f"<tr><td class='text'>{escape(model)}</td><td class='text'>{escape(mode)}</td>"
        f"<td class='text written'>{escape(str(text['text']))}</td>{cells}</tr>"
    )
