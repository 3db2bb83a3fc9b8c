"""Pictures drawn into a frame that was used before are those that matplotlib draws anew, point by point."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from evals import plots
from evals.frames import Framed, png
from evals.pareto_plot import pareto, pareto_frame, pareto_scales
from prune.base import GroupPlan, Plan, Scores

SCORES = {"blocks.0.heads": np.array([0.2, 0.9, 0.4, 0.7]), "blocks.0.neurons": np.geomspace(1e-4, 1.0, 12)}
LINES = {"fisher": [(3e6, 0.95), (2e6, 0.8)], "random": [(2e6, 0.5)]}
DENSE = [(4e6, 0.98)]


def plan(heads: tuple[int, ...], neurons: tuple[int, ...], ratio: float = 0.5) -> Plan:
    groups = (GroupPlan("blocks.0.heads", "head", 0, 4, heads), GroupPlan("blocks.0.neurons", "neuron", 0, 12, neurons))
    return Plan(groups, "macs", ratio, ratio)


FIRST, SECOND = plan((0, 1, 2), (0, 5, 11), 0.3), plan((1,), tuple(range(9)))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def anew(figure: Figure) -> np.ndarray:
    """The same picture by matplotlib's own way of drawing all of it."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return pixels(content.getvalue())


@pytest.mark.parametrize("picture", ["kept", "scores", "perplexity", "pareto"])
def test_a_frame_that_is_used_again_gives_the_same_picture(picture: str) -> None:
    if picture == "kept":
        frame = plots._kept_frame(plots._counted(FIRST))
        fill: list[Callable[[], Figure]] = [lambda p=p: plots._with_kept(frame, p) for p in (FIRST, SECOND, FIRST)]
    elif picture == "scores":
        frame = plots._scores_frame(plots._scored(FIRST, SCORES), "fisher")
        fill = [lambda p=p: plots._with_scores(frame, p, SCORES) for p in (FIRST, SECOND, FIRST)]
    else:
        height = 20.0 if picture == "perplexity" else 1.0
        lines = {name: [(x, y * height) for x, y in points] for name, points in LINES.items()}
        dense = [(x, y * height) for x, y in DENSE]
        few = {"fisher": lines["fisher"][:1]}
        frame = pareto_frame(*pareto_scales(dense), picture)
        fill = [lambda n=n: pareto(n, dense, picture, frame) for n in (few, lines, few)]
    drawn = []
    for filled in fill:
        figure = filled()
        assert isinstance(figure, Framed)
        drawn.append(pixels(png(figure)))
        assert np.array_equal(drawn[-1], anew(filled()))
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


def test_a_frame_is_drawn_again_only_where_limits_move(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    draw = Framed._draw_frame
    monkeypatch.setattr(Framed, "_draw_frame", lambda self, canvas: drawn.append(self) or draw(self, canvas))
    frame = pareto_frame(*pareto_scales(DENSE), "accuracy")
    first, inside, outside = (3e6, 0.9), (3.3e6, 0.95), (1e6, 0.1)
    for points, expected in (([first], 1), ([first, inside], 1), ([first, outside], 2), ([first, outside, inside], 2)):
        png(pareto({"fisher": points}, DENSE, "accuracy", frame))
        assert len(drawn) == expected, points


def test_the_jobs_of_a_sweep_share_frames_and_not_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    draw = Framed._draw_frame
    monkeypatch.setattr(Framed, "_draw_frame", lambda self, canvas: drawn.append(self) or draw(self, canvas))
    plots._same_kept_frame.cache_clear()
    plots._same_scores_frame.cache_clear()
    scores = Scores({"fisher": {name: torch.from_numpy(values) for name, values in SCORES.items()}})
    for job, pruned in enumerate((FIRST, SECOND)):
        assert plots.draw_plots(pruned, scores, [], [], tmp_path / str(job)) == [
            "plots/kept_units.png", "plots/scores_fisher.png",
        ]  # fmt: skip
    assert len(drawn) == 2
    for name, figure in (("kept_units", plots.kept_units(SECOND)),
                         ("scores_fisher", plots.scores_per_layer(SECOND, SCORES, "fisher"))):  # fmt: skip
        assert np.array_equal(pixels((tmp_path / "1" / "plots" / f"{name}.png").read_bytes()), anew(figure))
    other = {name: 2 * values for name, values in scores.terms["fisher"].items()}
    plots.draw_plots(SECOND, Scores({"fisher": other}), [], [], tmp_path / "2")
    assert len(drawn) == 3, "another ranking has a frame of its own"


def test_what_was_drawn_before_is_gone() -> None:
    frame = plots._kept_frame(plots._counted(FIRST))
    counts = [len(axes.get_children()) for axes in frame.axes]
    png(plots._with_kept(frame, FIRST))
    assert [len(axes.get_children()) for axes in frame.axes] != counts
    assert [len(axes.get_children()) for axes in frame.emptied().axes] == counts
    assert not Framed().has_frame and png(plots.learning_curve([{"epoch": 1, "loss": 1.0}], "x"))[:4] == b"\x89PNG"
