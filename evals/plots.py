"""The pictures of a run: units kept per layer, scores per layer, the training curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune.base import GroupPlan, Plan, Scores

KEPT, GONE, LINE = "#2a6f97", "#d9d9d9", "#c1440e"


def draw_plots(plan: Plan, scores: Scores | None, history: Sequence[Mapping[str, float]], out: Path) -> list[str]:
    """Draw what there is to draw into `out/plots`; returns the paths relative to `out`."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    if plan.groups and plan.budget:
        drawn["kept_units.png"] = kept_units(plan)
    if scores is not None and scores.terms:
        for term, groups in scores.terms.items():
            drawn[f"scores_{term}.png"] = scores_per_layer(plan, groups, term)
    if history:
        drawn["training_curve.png"] = training_curve(history)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=130, bbox_inches="tight")
        plt.close(figure)
    return [f"plots/{name}" for name in drawn]


def _by_kind(plan: Plan) -> dict[str, list[GroupPlan]]:
    kinds: dict[str, list[GroupPlan]] = {}
    for group in plan.groups:
        kinds.setdefault(group.kind, []).append(group)
    return kinds


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 3.4), squeeze=False, layout="constrained")
    return figure, list(axes[0])


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


def scores_per_layer(plan: Plan, scores: Mapping[str, "np.ndarray | object"], term: str) -> Figure:
    """Every unit's raw score by layer, kept ones and removed ones apart."""
    kinds = _by_kind(plan)
    figure, panels = _panels(len(kinds))
    jitter = np.random.default_rng(0)
    for axes, (kind, groups) in zip(panels, kinds.items(), strict=True):
        lowest = np.inf
        for at, group in enumerate(groups):
            values = np.asarray(scores[group.name], dtype=float)
            kept = np.isin(np.arange(group.count), group.kept)
            spread = at + jitter.uniform(-0.3, 0.3, group.count)
            for mask, colour, label in ((~kept, GONE, "removed"), (kept, KEPT, "kept")):
                edge = "#8a8a8a" if colour == GONE else colour
                axes.scatter(
                    spread[mask], values[mask], s=12, color=colour, edgecolors=edge, linewidths=0.4,
                    label=label if at == 0 else None,
                )  # fmt: skip
            lowest = min(lowest, values.min(initial=np.inf))
        axes.set(title=f"{_plural(kind)}", xlabel="layer", ylabel=f"{term} score")
        axes.set_xticks(np.arange(len(groups)), [str(g.layer) for g in groups])
        if 0 < lowest < np.inf:
            axes.set_yscale("log")
    panels[0].legend(loc="best", fontsize=8, frameon=False)
    figure.suptitle(f"{term}: raw score of every unit (higher is kept)")
    return figure


def training_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Every recorded quantity that ends in `loss`, against epochs."""
    figure, (axes,) = _panels(1)
    epochs = [row["epoch"] for row in history]
    losses = [name for name in history[0] if name.endswith("loss")]
    for name, colour in zip(losses, (KEPT, LINE, "#5c8001"), strict=False):
        axes.plot(epochs, [row[name] for row in history], color=colour, label=name.replace("_", " "))
    axes.set(title="training", xlabel="epoch", ylabel="loss (nat)")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure
