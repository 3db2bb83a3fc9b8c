"""The pictures of a run and of a sweep: units kept, scores, learning curves, Pareto."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from evals.frames import Framed, log_scale, png
from prune.base import GroupPlan, Plan, Scores
from utils.files import write_atomically

KEPT, GONE, LINE = "#2a6f97", "#d9d9d9", "#c1440e"
MANY = (
    "#2a6f97", "#c1440e", "#5c8001", "#8a4fbf", "#b8860b", "#16867d", "#a23b72", "#6c757d", "#d98e73", "#8fb8de",
)  # fmt: skip

# by kind of unit: layer and number of units of each group; layer and scores of each group
Counted = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
Scored = tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...]


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
        drawn["kept_units.png"] = png(_with_kept(_same_kept_frame(_counted(plan)), plan))
    for term, groups in scores.terms.items() if plan.groups else ():
        if plan.blocks:
            drawn[f"scores_{term}.png"] = scores_per_block(plan, groups, term)
        else:
            frame = _same_scores_frame(_scored(plan, groups), term)
            drawn[f"scores_{term}.png"] = png(_with_scores(frame, plan, groups))
    if history:
        drawn["training_curve.png"] = _dense_curve(tuple(tuple(row.items()) for row in history))
    if recovery:
        drawn["recovery_curve.png"] = learning_curve(recovery, "recovery of the pruned model")
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return [f"plots/{name}" for name in drawn]


@lru_cache(maxsize=2)
def _same_kept_frame(counted: Counted) -> Framed:
    """The frame that a job before used, if it had the same units."""
    return _kept_frame(counted)


@lru_cache(maxsize=8)
def _same_scores_frame(scored: Scored, term: str) -> Framed:
    """The frame that a job before used, if it had the same scores."""
    return _scores_frame(scored, term)


@lru_cache(maxsize=8)
def _dense_curve(history: tuple[tuple[tuple[str, float], ...], ...]) -> bytes:
    """The dense model's learning curve as PNG; the same in every job of a sweep, so drawn once."""
    return png(learning_curve([dict(row) for row in history], "training of the dense model"))


def _by_kind(plan: Plan) -> dict[str, list[GroupPlan]]:
    kinds: dict[str, list[GroupPlan]] = {}
    for group in plan.groups:
        kinds.setdefault(group.kind, []).append(group)
    return kinds


def _panels(count: int) -> tuple[Framed, list[Axes]]:
    figure = Framed(figsize=(5.2 * count, 3.6))
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
    return _with_kept(_kept_frame(_counted(plan)), plan)


def _counted(plan: Plan) -> Counted:
    return tuple((kind, tuple((g.layer, g.count) for g in groups)) for kind, groups in _by_kind(plan).items())


def _kept_frame(counted: Counted) -> Framed:
    """The bars of what there was; the same in every job of a sweep."""
    figure, panels = _panels(len(counted))
    for axes, (kind, groups) in zip(panels, counted, strict=True):
        at = np.arange(len(groups))
        axes.bar(at, [count for _, count in groups], color=GONE)
        axes.set(title=f"{_plural(kind)} kept", xlabel="layer", ylabel=_plural(kind))
        axes.set_xticks(at, [str(layer) for layer, _ in groups])
        axes.set_ylim(0, max((count for _, count in groups), default=1) * 1.18 or 1)
        axes.set_xlim(*axes.get_xlim())
    parts = [Patch(color=GONE, label="removed"), Patch(color=KEPT, label="kept")]
    panels[0].legend(handles=parts, loc="upper left", ncols=2, fontsize=8, frameon=False)  # above all bars
    return figure.framed()


def _with_kept(figure: Framed, plan: Plan) -> Framed:
    for axes, groups in zip(figure.emptied().axes, _by_kind(plan).values(), strict=True):
        bars = axes.bar(np.arange(len(groups)), [len(g.kept) for g in groups], color=KEPT)
        if len(groups) <= 24:
            axes.bar_label(bars, [str(len(g.kept)) for g in groups], padding=1, fontsize=8)
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
    return _with_scores(_scores_frame(_scored(plan, scores), term), plan, scores)


def _scored(plan: Plan, scores: Mapping[str, "np.ndarray | object"]) -> Scored:
    """Layers and scores by kind, as bytes, so that a frame can be found again by them."""
    return tuple(
        (kind, tuple((g.layer, np.asarray(scores[g.name], dtype=float).tobytes()) for g in groups))
        for kind, groups in _scored_kinds(plan, scores).items()
    )


def _scored_kinds(plan: Plan, scores: Mapping[str, "np.ndarray | object"]) -> dict[str, list[GroupPlan]]:
    return {kind: groups for kind, groups in _by_kind(plan).items() if all(g.name in scores for g in groups)}


def _scores_frame(scored: Scored, term: str) -> Framed:
    """Axes that hold all scores; the same for all ratios of one ranking."""
    figure, panels = _panels(len(scored))
    jitter = np.random.default_rng(0)
    for axes, (kind, groups) in zip(panels, scored, strict=True):
        values = [np.frombuffer(content) for _, content in groups]
        joined = np.concatenate([*values, np.zeros(0)])
        points = axes.plot(_spread([len(found) for found in values], jitter), joined, "o")
        axes.set(title=f"{_plural(kind)}", xlabel="layer", ylabel=f"{term} score")
        axes.set_xticks(np.arange(len(groups)), [str(layer) for layer, _ in groups])
        lowest, highest = joined.min(initial=np.inf), joined.max(initial=0.0)
        if 0 < 10 * lowest < highest:
            log_scale(axes, few_decades=highest < 1000 * lowest)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        points[0].remove()
    figure.suptitle(f"{term}: raw score of every unit")
    return figure.framed()


def _spread(counts: Sequence[int], jitter: np.random.Generator) -> np.ndarray:
    """Where units stand beside each other: by layer, a little apart."""
    found = [at + jitter.uniform(-0.3, 0.3, count) for at, count in enumerate(counts)]
    return np.concatenate([*found, np.zeros(0)])


def _with_scores(figure: Framed, plan: Plan, scores: Mapping[str, "np.ndarray | object"]) -> Framed:
    jitter = np.random.default_rng(0)
    for axes, groups in zip(figure.emptied().axes, _scored_kinds(plan, scores).values(), strict=True):
        spread = _spread([g.count for g in groups], jitter)
        values = np.concatenate([*(np.asarray(scores[g.name], dtype=float) for g in groups), np.zeros(0)])
        kept = np.concatenate([*(np.isin(np.arange(g.count), g.kept) for g in groups), np.zeros(0, bool)])
        for mask, colour, edge, label in ((~kept, GONE, "#8a8a8a", "removed"), (kept, KEPT, KEPT, "kept")):
            # plot draws markers of one style several times faster than scatter
            axes.plot(
                spread[mask], values[mask], "o", markersize=3.5, color=colour, markeredgecolor=edge,
                markeredgewidth=0.4, label=label,
            )  # fmt: skip
    figure.axes[0].legend(loc="best", fontsize=8, frameon=False)
    return figure


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


def save_figure(figure: Figure | bytes, path: Path) -> None:
    """Write a figure, or one that is drawn already, as PNG, completely or not at all."""
    write_atomically(path, figure if isinstance(figure, bytes) else png(figure), synced=False)
