"""The picture of a sweep: quality against MACs."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.frames import Framed, log_scale


def pareto(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    dense: Sequence[tuple[float, float]],
    quality: str = "accuracy",
    into: Framed | None = None,
) -> Figure:
    """Quality against MACs: one line a method, dense models marked.

    Args:
        lines: Per label the points (MACs, quality).
        dense: The points of the dense models.
        quality: Name of the metric.
        into: A frame to draw into, of `pareto_frame` for the same name and scales.
    """
    everything = [*dense, *(p for points in lines.values() for p in points)]
    figure = (into or pareto_frame(*pareto_scales(everything), quality)).emptied()
    (axes,) = figure.axes
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    axes.plot(*zip(*dense, strict=True), marker="*", markersize=13, linestyle="", color="black", label="dense")
    axes.relim()
    axes.autoscale(True)
    axes.autoscale_view()
    _round_limits(axes)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _round_limits(axes: Axes) -> None:
    """Let axes end at round numbers, so that most points that come later lie inside."""
    first, *_, last = MaxNLocator(20).tick_values(*axes.get_xlim())
    axes.set_xlim(first, last)
    if axes.get_yscale() == "linear":
        first, *_, last = MaxNLocator(20).tick_values(*axes.get_ylim())
        axes.set_ylim(first, last)


def same_pareto_frame(points: Sequence[tuple[float, float]], quality: str) -> Framed:
    """The frame that was used before for such points, if there is one."""
    return _same_pareto_frame(*pareto_scales(points), quality)


def pareto_scales(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, str], int]:
    """The unit of the MACs, and how the quality is drawn: 0 plainly, 1 by a logarithm over few decades, 2 over many."""
    macs, values = [cost for cost, _ in points], [value for _, value in points]
    unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if max(macs) >= s), (1, ""))
    if max(values) <= 1:  # a perplexity is more; shares are 1 at most
        return unit, 0
    return unit, 1 if max(values) < 1000 * min(values) else 2


@lru_cache(maxsize=4)
def _same_pareto_frame(unit: tuple[float, str], logarithm: int, quality: str) -> Framed:
    return pareto_frame(unit, logarithm, quality)


def pareto_frame(unit: tuple[float, str], logarithm: int, quality: str) -> Framed:
    """Axes to draw quality against MACs in, as `pareto_scales` says."""
    figure = Framed(figsize=(6.4, 4.4))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.12, top=0.92)
    axes = figure.subplots()
    axes.set_title("", y=1.0)
    axes.xaxis.set_major_formatter(lambda macs, _: f"{macs / unit[0]:g}")
    axes.set(xlabel=f"MACs per sample ({unit[1]})", ylabel=quality, title=f"{quality} against MACs")
    if logarithm:
        log_scale(axes, few_decades=logarithm == 1)
    axes.grid(alpha=0.3)
    return figure.framed()
