"""Generated text as blocks of Markdown: what dense and pruned models made of the same prompts.

Works on the plain values of result.json, so that a sweep's report needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Measured = Mapping[str, Mapping[str, Any]]
COUNTED = (("perplexity", "perplexity"), ("distinct_2", "distinct-2"), ("repetition", "repeated 4-grams"))


def text_blocks(models: Mapping[str, Measured], most: int | None = None) -> str:
    """One section a prompt, with every model's continuation of it; empty where nothing was generated.

    Args:
        models: Measurements as in result.json by the model's heading, the dense one first.
        most: Prompts to show; None: all.
    """
    first = next(iter(models.values()), {})
    found = {name: measured["continuations"] for name, measured in first.items() if measured.get("continuations")}
    parts: list[str] = []
    for number, text in enumerate(next(iter(found.values()), [])[:most]):
        parts += [f"### Prompt {number + 1}", fenced(text["prompt"])]
        for name in found:
            parts += _of_mode(models, name, number)
    return "\n\n".join(parts)


def _of_mode(models: Mapping[str, Measured], name: str, number: int) -> list[str]:
    mode = name.removesuffix("_perplexity")
    parts = []
    for heading, measured in models.items():
        texts: Sequence[Mapping[str, Any]] = measured.get(name, {}).get("continuations", [])
        if number < len(texts):
            parts += [f"**{heading}, {mode}** ({_counted(texts[number])})", fenced(texts[number]["text"])]
    return parts


def _counted(text: Mapping[str, Any]) -> str:
    shown = [f"{words} {text[key]:.3g}" for key, words in COUNTED if isinstance(text.get(key), int | float)]
    ended = [f"end of text at token {text['eos_at']}"] if text.get("eos_at") is not None else []
    return ", ".join(shown + ended)


def fenced(text: str) -> str:
    """A text as it stands, whatever is in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
