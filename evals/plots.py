"""The pictures of a run and of a sweep: units kept, scores, learning curves, Pareto."""

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from prune.base import GroupPlan, Plan, Scores
from utils.files import write_atomically

KEPT, GONE, LINE = "#2a6f97", "#d9d9d9", "#c1440e"
MANY = (
    "#2a6f97", "#c1440e", "#5c8001", "#8a4fbf", "#b8860b", "#16867d", "#a23b72", "#6c757d", "#d98e73", "#8fb8de",
)  # fmt: skip


def draw_plots(
    plan: Plan,
    scores: Scores,
    history: Sequence[Mapping[str, float]],
    recovery: Sequence[Mapping[str, float]],
    out: Path,
) -> list[str]:
    """Draw what there is to draw into `out/plots`; returns the paths relative to `out`."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure | bytes] = {}
    if plan.tokens:
        drawn["tokens.png"] = tokens_per_block(plan)
    if plan.groups and plan.budget and not ((plan.tokens or plan.blocks) and plan.keeps_all_units):
        drawn["kept_units.png"] = kept_units(plan)
    for term, groups in scores.terms.items() if plan.groups else ():
        draw = scores_per_block if plan.blocks else scores_per_layer
        drawn[f"scores_{term}.png"] = draw(plan, groups, term)
    if history:
        drawn["training_curve.png"] = _dense_curve(tuple(tuple(row.items()) for row in history))
    if recovery:
        drawn["recovery_curve.png"] = learning_curve(recovery, "recovery of the pruned model")
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return [f"plots/{name}" for name in drawn]


@lru_cache(maxsize=8)
def _dense_curve(history: tuple[tuple[tuple[str, float], ...], ...]) -> bytes:
    """The dense model's learning curve as PNG; the same in every job of a sweep, so drawn once."""
    return png(learning_curve([dict(row) for row in history], "training of the dense model"))


def _by_kind(plan: Plan) -> dict[str, list[GroupPlan]]:
    kinds: dict[str, list[GroupPlan]] = {}
    for group in plan.groups:
        kinds.setdefault(group.kind, []).append(group)
    return kinds


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * count, 3.6))
    # fixed margins: finding them by layout costs as much as drawing, in every job of a sweep
    figure.subplots_adjust(left=0.8 / (5.2 * count), right=1 - 0.15 / (5.2 * count), bottom=0.14, top=0.83, wspace=0.22)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.set_title("", y=1.0)  # a height of its own spares looking for one, which lays out all tick labels
    return figure, axes


def _plural(kind: str) -> str:
    return f"{kind}s"


def kept_units(plan: Plan) -> Figure:
    """Bars of what each layer keeps of each kind, out of what it had."""
    kinds = _by_kind(plan)
    figure, panels = _panels(len(kinds))
    for axes, (kind, groups) in zip(panels, kinds.items(), strict=True):
        at = np.arange(len(groups))
        axes.bar(at, [g.count for g in groups], color=GONE, label="removed")
        bars = axes.bar(at, [len(g.kept) for g in groups], color=KEPT, label="kept")
        if len(groups) <= 24:
            axes.bar_label(bars, [str(len(g.kept)) for g in groups], padding=1, fontsize=8)
        axes.set(title=f"{_plural(kind)} kept", xlabel="layer", ylabel=_plural(kind))
        axes.set_xticks(at, [str(g.layer) for g in groups])
        axes.set_ylim(0, max((g.count for g in groups), default=1) * 1.18 or 1)
    panels[0].legend(loc="upper left", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"{plan.ratio_reached:.1%} of the {plan.budget} removed")
    return figure


def tokens_per_block(plan: Plan) -> Figure:
    """Tokens that enter the attention and the MLP of every block."""
    figure, (axes,) = _panels(1)
    at = np.arange(len(plan.token_counts))
    for counts, half, shift, colour in zip(
        zip(*plan.token_counts, strict=True), ("attention", "MLP"), (-0.2, 0.2), (KEPT, LINE), strict=True
    ):
        bars = axes.bar(at + shift, counts, 0.4, color=colour, label=half)
        if len(at) <= 12 and half == "MLP":
            axes.bar_label(bars, padding=1, fontsize=7)
    axes.set(xlabel="layer", ylabel="tokens")
    axes.set_xticks(at, [str(layer) for layer in at])
    axes.set_ylim(0, max(n for n, _ in plan.token_counts) * 1.18)
    axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"tokens per block: {plan.ratio_reached:.1%} of the {plan.budget} removed")
    return figure


def scores_per_block(plan: Plan, scores: Mapping[str, "np.ndarray | object"], term: str) -> Figure:
    """A line for each set of scores, of blocks or of windows by their first block; removed blocks are shaded."""
    figure, (axes,) = _panels(1)
    for name, values in scores.items():
        points = np.asarray(values, dtype=float)
        axes.plot(np.arange(len(points)), points, marker="o", markersize=4, label=name.replace("_", " "))
    for position in plan.blocks.removed if plan.blocks else ():
        axes.axvspan(position - 0.4, position + 0.4, color=GONE, zorder=0)
    axes.set(xlabel="block, or the first of a window (removed ones shaded)", ylabel=f"{term.replace('_', ' ')}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best", fontsize=7, frameon=False, ncols=2)
    figure.suptitle(f"blocks: {plan.ratio_reached:.1%} of the {plan.budget} removed")
    return figure


def scores_per_layer(plan: Plan, scores: Mapping[str, "np.ndarray | object"], term: str) -> Figure:
    """Every unit's raw score by layer, kept ones and removed ones apart; kinds that were not scored are left out."""
    kinds = {kind: groups for kind, groups in _by_kind(plan).items() if all(g.name in scores for g in groups)}
    figure, panels = _panels(len(kinds))
    jitter = np.random.default_rng(0)
    for axes, (kind, groups) in zip(panels, kinds.items(), strict=True):
        lowest, highest = np.inf, 0.0
        for at, group in enumerate(groups):
            values = np.asarray(scores[group.name], dtype=float)
            kept = np.isin(np.arange(group.count), group.kept)
            spread = at + jitter.uniform(-0.3, 0.3, group.count)
            for mask, colour, label in ((~kept, GONE, "removed"), (kept, KEPT, "kept")):
                edge = "#8a8a8a" if colour == GONE else colour
                # plot draws markers of one style several times faster than scatter
                axes.plot(
                    spread[mask], values[mask], "o", markersize=3.5, color=colour, markeredgecolor=edge,
                    markeredgewidth=0.4, label=label if at == 0 else None,
                )  # fmt: skip
            lowest, highest = min(lowest, values.min(initial=np.inf)), max(highest, values.max(initial=0.0))
        axes.set(title=f"{_plural(kind)}", xlabel="layer", ylabel=f"{term} score")
        axes.set_xticks(np.arange(len(groups)), [str(g.layer) for g in groups])
        if 0 < 10 * lowest < highest:
            _log_scale(axes, few_decades=highest < 1000 * lowest)
    panels[0].legend(loc="best", fontsize=8, frameon=False)
    figure.suptitle(f"{term}: raw score of every unit")
    return figure


def _log_scale(axes: Axes, few_decades: bool) -> None:
    """A logarithmic y axis in plain numbers: matplotlib's powers are formulas, slower than all the rest."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def time_by_kind(sides: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Stacked bars of where one pass spends its time, one bar a model.

    Args:
        sides: Per model milliseconds by kind of operator.
        title: Above it.
    """
    figure, (axes,) = _panels(1)
    kinds = list(dict.fromkeys(kind for found in sides.values() for kind in found))
    bottom = np.zeros(len(sides))
    for kind, colour in zip(kinds, MANY, strict=False):
        heights = np.array([found.get(kind, 0.0) for found in sides.values()])
        axes.bar(list(sides), heights, 0.5, bottom=bottom, color=colour, label=kind)
        bottom += heights
    axes.set(ylabel="ms of one pass")
    axes.set_xlim(-0.5, len(sides) + 0.7)
    axes.legend(loc="upper right", fontsize=7, frameon=False, reverse=True)
    figure.suptitle(title)
    return figure


def learning_curve(history: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Losses against epochs, and beside them what else was measured on the validation split."""
    names = [name for name in history[-1] if name not in ("epoch", "learning_rate")]
    losses = [name for name in names if name.endswith("loss")]
    others = [name for name in names if name not in losses]
    figure, panels = _panels(1 + bool(others))
    for axes, chosen, label in zip(panels, (losses, others), ("loss (nat)", "fraction"), strict=False):
        for name, colour in zip(chosen, (LINE, KEPT, "#5c8001"), strict=False):
            points = [(row["epoch"], row[name]) for row in history if name in row]
            text = f"{name.replace('_', ' ')} (label-smoothed)" if name == "train_loss" else name.replace("_", " ")
            axes.plot(*zip(*points, strict=True), color=colour, label=text, marker="." if len(points) < 30 else None)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    panels[0].set_ylim(bottom=0)
    figure.suptitle(title)
    return figure


def pareto(
    lines: Mapping[str, Sequence[tuple[float, float]]], dense: Sequence[tuple[float, float]], quality: str = "accuracy"
) -> Figure:
    """Quality against MACs: one line a method, dense models marked.

    Args:
        lines: Per label the points (MACs, quality).
        dense: The points of the dense models.
        quality: Name of the metric.
    """
    figure = Figure(figsize=(6.4, 4.4))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.12, top=0.92)
    axes = figure.subplots()
    axes.set_title("", y=1.0)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    axes.plot(*zip(*dense, strict=True), marker="*", markersize=13, linestyle="", color="black", label="dense")
    largest = max(macs for macs, _ in [*dense, *(p for points in lines.values() for p in points)])
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= s), (1, ""))
    axes.xaxis.set_major_formatter(lambda macs, _: f"{macs / scale:g}")
    axes.set(xlabel=f"MACs per sample ({unit})", ylabel=quality, title=f"{quality} against MACs")
    values = [value for _, value in [*dense, *(p for points in lines.values() for p in points)]]
    if max(values) > 1:  # a perplexity; shares are 1 at most
        _log_scale(axes, few_decades=max(values) < 1000 * min(values))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """Draw a figure."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", pil_kwargs={"compress_level": 1})
    return content.getvalue()


def save_figure(figure: Figure | bytes, path: Path) -> None:
    """Write a figure, or one that is drawn already, as PNG, completely or not at all."""
    write_atomically(path, figure if isinstance(figure, bytes) else png(figure))
