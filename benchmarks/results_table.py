"""A page's table of results in Markdown, made of the rows of its csv."""

import re
import shlex
from collections.abc import Iterable, Sequence

from benchmarks.results_csv import TRACKS, Row

Lines = dict[tuple[str, str], list[Row]]
NAMES = {
    "units": "heads and neurons", "weights": "zeros in weights", "tokens": "tokens", "both": "units and tokens",
    "recovered": "trained afterwards",
}  # fmt: skip
# words of a method; all others are of model, data and what is measured
OWN = re.compile(r"^(prune|recover|seed|data\.calibration_seed|data\.train_samples|joules)\b")
OWN_RATIO = re.compile(r"^prune\.ratio=")
# an executed share this far from the one asked for is told
TOLD = 0.005


def lines_of(rows: Iterable[Row]) -> Lines:
    """The rows of each track and method by what was removed, in the order of the tracks."""
    found: Lines = {}
    for row in sorted(rows, key=lambda r: (TRACKS.index(r.track), r.removed)):
        found.setdefault((row.track, row.method), []).append(row)
    return found


def scaled(row: Row) -> tuple[float, float | None]:
    """Value and standard error as a page shows them: accuracy in percent."""
    factor = 100 if row.metric == "accuracy" else 1
    return factor * row.value, None if row.standard_error is None else factor * row.standard_error


def table(rows: Sequence[Row]) -> str:
    """One row a method, one column a share removed, the best of each track and column bold; then how commands begin."""
    lines, dense = lines_of(rows), [row for row in rows if row.track == "dense"]
    ratios = sorted({row.removed for row in rows})
    begins = dict.fromkeys(command_of(row)[0] for found in lines.values() for row in found)
    starts = [start for start in begins if start]
    joules = [f"joules ({status})" for status in sorted({row.joules_status for row in rows} - {""})]
    head = [*(f"{ratio:.0%}" for ratio in ratios), "s: rank, repair, train", *joules, "command"]
    text = [_line(["what goes", "method", *head]), f"|---|---|{'--:|' * len(ratios)}---|{'--:|' * len(joules)}---|"]
    text += [_line(["nothing", row.method, _value(row), *[""] * len(head[1:-1]), _own([row], starts)]) for row in dense]
    for (track, method), found in lines.items():
        if track != "dense":
            cells = [_cell([row for row in found if row.removed == ratio], rows) for ratio in ratios]
            spent = [_spent(found), *(_joules(found) for _ in joules)]
            text.append(_line([NAMES[track], method, *cells, *spent, _own(found, starts)]))
    text += ["", "A command's number says how it begins:", ""]
    text += [f"    {number}: {start}" for number, start in enumerate(starts, start=1)]
    return "\n".join(text) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(row: Row) -> str:
    value, error = scaled(row)
    digits = 2 if value < 100 else 1
    return _plain(value, digits) + ("" if error is None else f" ({_plain(error, digits)})")


def _plain(value: float, digits: int) -> str:
    return f"{value:.0f}" if digits == 1 and value == round(value) else f"{value:.{digits}f}"


def _cell(found: Sequence[Row], rows: Sequence[Row]) -> str:
    if not found:
        return ""
    row, sign = found[0], -1 if found[0].metric == "accuracy" else 1
    rivals = [other for other in rows if (other.track, other.removed) == (row.track, row.removed)]
    text = _value(row)
    if len(rivals) > 1 and row.value == min(rivals, key=lambda other: sign * other.value).value:
        text = f"**{text}**"
    far = row.track != "weights" and abs(row.macs - (1 - row.removed)) > TOLD
    return f"{text} at {row.macs:.1%}" if far else text


def _spent(found: Sequence[Row]) -> str:
    """The dearest of each kind: a ranking serves all ratios, so that later ones find it done."""
    each = [max((s for s in column if s is not None), default=None) for column in zip(
        *((row.rank_s, row.repair_s, row.train_s) for row in found), strict=True)]  # fmt: skip
    return (
        "" if each == [None] * 3 else ", ".join("–" if s is None else f"{s:.2g}" if s < 1 else f"{s:.0f}" for s in each)
    )


def _joules(found: Sequence[Row]) -> str:
    known = [row.joules for row in found if row.joules is not None]
    return f"{max(known):,.0f}" if known else ""


def command_of(row: Row) -> tuple[str, str, str | None]:
    """How a command begins (program, model, data, metrics), its own words (method, recovery, seeds), and its ratio.

    Put together they are the command: `-m` is always there, as it does no harm to a single job.
    """
    words = shlex.split(row.command)
    if words[:2] != ["python", "main.py"]:
        return "", row.command, None
    own = [word for word in words[2:] if OWN.match(word) and not OWN_RATIO.match(word)]
    rest = [word for word in words[2:] if word != "-m" and not OWN.match(word)]
    ratio = next((word.partition("=")[2] for word in words if OWN_RATIO.match(word)), None)
    return " ".join(["python main.py -m", *map(_quoted, rest)]), " ".join(map(_quoted, own)), ratio


def _own(found: Sequence[Row], starts: Sequence[str]) -> str:
    """The commands of a method, ratios that differ in nothing else in one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in found:
        start, own, ratio = command_of(row)
        alike.setdefault((start, own), []).extend([ratio] if ratio else [])
    return "; ".join(
        (f"{starts.index(start) + 1}: " if start else "") + f"`{_with(own, list(dict.fromkeys(given)))}`"
        for (start, own), given in alike.items()
    )


def _with(own: str, ratios: Sequence[str]) -> str:
    return f"{own} prune.ratio={','.join(ratios)}" if ratios else own


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./$<>\-]+", word) else f'"{word}"' if "'" in word else f"'{word}'"
