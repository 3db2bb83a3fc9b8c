"""The table and the picture of a page of results: `python -m benchmarks.pareto docs/results/deit_tiny.csv`.

Prints Markdown and draws docs/plots/<model>.png: quality against executed MACs, one line a method, the dense model
marked; zeros in weights save no MACs, so they have a panel of their own, against their share.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.results_csv import Row, read_rows
from benchmarks.results_table import NAMES, lines_of, scaled, table
from evals.plots import GONE, MANY, save_figure
from utils.errors import InputError

# what stands in a panel together
PANELS = (("units", "recovered"), ("tokens", "both"), ("weights",))
STYLES = {"units": "-", "weights": "-", "tokens": "--", "both": "-.", "recovered": ":"}
MARKS = "osD^vPXd<>p*h"
COLOURS = (*MANY, "#111111", "#e07bb5", "#00a6b8", "#8a8a00", "#7a4a2b")


def front(points: Iterable[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    """The points (cost, quality) that no other one beats in both, by rising cost.

    Args:
        points: Any number.
        rising: Whether more quality is better.
    """
    sign, best = (1 if rising else -1), list[tuple[float, float]]()
    for cost, quality in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * quality > sign * best[-1][1]:
            best.append((cost, quality))
    return best


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for units, for tokens and for zeros, as far as there are any, each with its legend below."""
    lines = lines_of(rows)
    panels = [(tracks, [key for key in lines if key[0] in tracks]) for tracks in PANELS]
    panels = [(tracks, keys) for tracks, keys in panels if keys]
    figure = Figure(figsize=(5.4 * len(panels), 6.6))
    figure.subplots_adjust(left=0.75 / (5.4 * len(panels)), right=0.99, bottom=0.33, top=0.93, wspace=0.2)
    best = front(
        [(round(100 * r.macs), scaled(r)[0]) for r in rows if r.track != "weights"], rows[0].metric == "accuracy"
    )
    for axes, (tracks, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        zeros = "weights" in tracks
        for number, key in enumerate(keys):
            _draw_line(axes, key, lines[key], number, zeros)
        _finish(axes, rows[0].metric, zeros)
        _draw_dense(axes, [row for row in rows if row.track == "dense"], zeros)
        if not zeros:
            limits = axes.get_ylim()
            axes.plot(*zip(*best, strict=True), color=GONE, linewidth=6, zorder=0, label="the front of all panels")
            axes.set_ylim(limits)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=7.5, frameon=False, ncols=2)
    figure.suptitle(f"{rows[0].model}: {rows[0].metric}, with standard errors")
    return figure


def _draw_dense(axes: Axes, dense: Sequence[Row], zeros: bool) -> None:
    """The dense model; where zeros were measured on other samples than the rest, on those."""
    row = dense[-1 if zeros else 0]
    axes.plot(0 if zeros else 100, scaled(row)[0], "*", color="black", markersize=13, label=row.method, zorder=5)


def _draw_line(axes: Axes, key: tuple[str, str], found: Sequence[Row], number: int, zeros: bool) -> None:
    track, method = key
    at = [100 * (row.removed if zeros else row.macs) for row in found]
    values, errors = zip(*map(scaled, found), strict=True)
    axes.errorbar(
        at, values, [error or 0.0 for error in errors], color=COLOURS[number % len(COLOURS)], linestyle=STYLES[track],
        marker=MARKS[number % len(MARKS)], markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2,
        label=f"{method} ({NAMES[track]})" if track == "both" else method,
    )  # fmt: skip


def _finish(axes: Axes, metric: str, zeros: bool) -> None:
    axes.set(xlabel="zeros, % of the weights" if zeros else "executed MACs, % of the dense model's")
    axes.set_ylabel("accuracy, %" if metric == "accuracy" else f"{metric} (log)")
    axes.grid(alpha=0.3)
    if metric == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 if a file can't be read as rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description="Table and picture of results.")
    parser.add_argument("file", type=Path, help="docs/results/<model>.csv")
    parser.add_argument("--plots", type=Path, default=Path("docs/plots"), help="where the picture goes (docs/plots)")
    given = parser.parse_args(arguments)
    try:
        rows = read_rows(given.file)
        if not rows:
            raise InputError(f"{given.file}: has no rows")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    given.plots.mkdir(parents=True, exist_ok=True)
    save_figure(draw(rows), given.plots / f"{given.file.stem}.png")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
