"""Pictures of weights, of what was kept of each layer, of sensitivity, and of several trainings side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from evals.plots import GONE, KEPT, LINE
from models.base import PrunableModel
from prune.base import Plan

Row = Mapping[str, Any]
COLOURS = {"dense": "#8a8a8a", "pruned": LINE, "recovered": KEPT}
BINS = 80


def block_weights(model: PrunableModel) -> dict[int, np.ndarray]:
    """All weights of linears and convolutions in each block, by its position in the dense model."""
    found = {}
    for at, block in zip(model.block_origin, model.blocks(), strict=False):
        modules = [m for m in model.network.get_submodule(block).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        flat = [m.weight.detach().float().flatten().cpu().numpy() for m in modules]
        found[at] = np.concatenate(flat) if flat else np.zeros(0)
    return found


def overall_distribution(models: Mapping[str, PrunableModel]) -> Figure | None:
    """How many weights of the blocks have which size, zeros left out and counted, one line a model."""
    values = {name: np.concatenate([*block_weights(model).values(), np.zeros(0)]) for name, model in models.items()}
    largest = max((float(np.abs(found).max(initial=0.0)) for found in values.values()), default=0.0)
    if largest == 0:
        return None
    figure, axes = _single()
    edges = np.linspace(-largest, largest, 2 * BINS + 1)
    for name, found in values.items():
        counts, _ = np.histogram(found[found != 0], bins=edges)
        label = f"{name}: {len(found):,} weights, {int((found == 0).sum()):,} zeros"
        axes.stairs(counts + 0.5, edges, color=COLOURS.get(name, KEPT), label=label)
    axes.set_yscale("log")
    axes.set(xlabel="weight", ylabel="number (zeros left out)", title="weights in the blocks")
    axes.legend(frameon=False, fontsize=8)
    return figure


def weight_distributions(before: PrunableModel, after: PrunableModel) -> Figure | None:
    """The same block by block, as parts of the largest bin: before in grey, after in colour."""
    first, second = block_weights(before), block_weights(after)
    if not first:
        return None
    columns = min(4, len(first))
    figure = Figure(figsize=(2.9 * columns, 2.1 * -(-len(first) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(first) // columns), columns, squeeze=False).flatten()
    for panel, (at, values) in zip(panels, first.items(), strict=False):
        largest = float(np.abs(values).max(initial=0.0)) or 1.0
        edges = np.linspace(-largest, largest, BINS + 1)
        for found, colour in ((values, COLOURS["dense"]), (second.get(at, np.zeros(0)), KEPT)):
            counts, _ = np.histogram(found[found != 0], bins=edges)
            panel.stairs(counts, edges, color=colour)
        left = second.get(at, np.zeros(0))
        panel.set_title(f"block {at}: {np.count_nonzero(left) / max(len(values), 1):.0%} left", fontsize=8)
        panel.tick_params(labelsize=6)
    for panel in panels[len(first) :]:
        panel.set_axis_off()
    figure.suptitle("weights before (grey) and after", fontsize=10)
    return figure


def kept_rows(plan: Plan) -> Figure | None:
    """One strip a group of units and a masked linear: kept dark, removed light, masked in another colour."""
    masked = plan.details.get("masked_rows", {})
    strips = [(g.name, g.count, set(range(g.count)) - set(g.kept), GONE) for g in plan.groups if g.count]
    sizes = {matrix.name: matrix.count for matrix in plan.matrices}
    zeros = {matrix.name: matrix.zeros for matrix in plan.matrices}
    for name, rows in masked.items():
        if rows:
            strips.append((f"{name} (masked)", len(rows) * sizes[name] // max(zeros[name], 1), set(rows), LINE))
    if not strips or not any(gone for *_, gone, _ in strips):
        return None
    figure = Figure(figsize=(7.5, 0.7 + 0.17 * len(strips)), layout="constrained")
    axes = figure.subplots()
    for at, (_, count, gone, colour) in enumerate(strips):
        axes.barh(at, 1.0, height=0.75, color=KEPT)
        for unit in gone:
            axes.barh(at, 1 / count, left=unit / count, height=0.75, color=colour)
    axes.set_yticks(range(len(strips)), [f"{name} ({count - len(gone)}/{count})" for name, count, gone, _ in strips])
    axes.tick_params(labelsize=6)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xticks=[], title="rows: kept dark, removed light, masked only red")
    return figure


def heat_map(rows: Sequence[Row]) -> Figure:
    """Loss change by part and ratio."""
    parts, grid = list(dict.fromkeys(row["part"] for row in rows)), sorted({round(row["ratio"], 2) for row in rows})
    cells = np.full((len(parts), len(grid)), np.nan)
    for row in rows:
        cells[parts.index(row["part"]), grid.index(round(row["ratio"], 2))] = row["loss_change"]
    figure = Figure(figsize=(1.8 + 0.35 * len(grid), 1.2 + 0.16 * len(parts)), layout="constrained")
    axes = figure.subplots()
    largest = float(np.nanmax(np.abs(cells))) or 1.0
    image = axes.imshow(np.cbrt(cells / largest), aspect="auto", cmap="coolwarm", vmin=-1, vmax=1)
    axes.set_yticks(range(len(parts)), parts, fontsize=6)
    axes.set_xticks(range(len(grid)), [f"{ratio:g}" for ratio in grid], fontsize=6, rotation=90)
    axes.set(xlabel="fraction removed", title="loss change")
    bar = figure.colorbar(image, ax=axes, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels([f"{largest * tick**3:.2g}" for tick in (-1, -0.5, 0, 0.5, 1)], fontsize=6)
    return figure


def curves_of_parts(rows: Sequence[Row]) -> Figure:
    """Loss change against the fraction removed, a panel a kind, a line a part, coloured by block."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    last = max((row["layer"] for row in rows), default=0) or 1
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        for part in dict.fromkeys(row["part"] for row in own):
            line = [row for row in own if row["part"] == part]
            red = line[0]["layer"] / last
            x, y = [0.0, *(row["ratio"] for row in line)], [0.0, *(row["loss_change"] for row in line)]
            axes.plot(x, y, color=(0.15 + 0.7 * red, 0.3, 0.75 - 0.6 * red), linewidth=1)
        axes.set(title=f"{kind}s (blue: first block, red: last)", xlabel="fraction removed", ylabel="loss change (nat)")
    return figure


def side_by_side(trainings: Mapping[str, Sequence[Row]], quality: str) -> Figure:
    """Quality against epochs of several recoveries: a line each, by what was pruned."""
    figure, axes = _single()
    for label, history in trainings.items():
        points = [(row["epoch"], row[quality]) for row in history if row.get(quality) is not None]
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="epoch (0: as the cut left it)", ylabel=quality.replace("_", " "), title="recovery side by side")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    return figure, figure.subplots()
