"""Pictures: the dense model's is drawn once for a sweep, and logarithmic axes read as plain numbers."""

from pathlib import Path

import numpy as np
import pytest

from evals import plots
from prune.base import GroupPlan, Plan, Scores

PLAN = Plan((GroupPlan("blocks.0.heads", "head", 0, 4, (0, 1)),), "macs", 0.5, 0.5)
HISTORY = [{"epoch": epoch, "train_loss": 1 / epoch, "validation_accuracy": 1 - 1 / epoch} for epoch in (1, 2, 3)]


def test_the_dense_models_curve_is_drawn_once(tmp_path: Path, monkeypatch) -> None:
    drawn: list[object] = []
    draw = plots.learning_curve
    monkeypatch.setattr(plots, "learning_curve", lambda history, title: drawn.append(title) or draw(history, title))
    plots._dense_curve.cache_clear()
    for job in ("0", "1"):
        paths = plots.draw_plots(PLAN, Scores({}), HISTORY, HISTORY[:2], tmp_path / job)
        assert paths == ["plots/kept_units.png", "plots/training_curve.png", "plots/recovery_curve.png"]
        assert all((tmp_path / job / path).read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert [str(title).split()[0] for title in drawn] == ["training", "recovery", "recovery"]
    plots.draw_plots(PLAN, Scores({}), HISTORY[:2], [], tmp_path / "other")
    other = (tmp_path / "other" / "plots" / "training_curve.png").read_bytes()
    assert other != (tmp_path / "0" / "plots" / "training_curve.png").read_bytes()


@pytest.mark.parametrize(
    ("scores", "labels"),
    [((0.3, 0.5, 2.0, 4.0), {"0.5", "1", "2"}), ((1e-7, 1e-5, 1e-3, 1.0), {"1e−06", "0.0001", "0.01", "1"})],
)
def test_logarithmic_axes_read_as_plain_numbers(scores: tuple[float, ...], labels: set[str]) -> None:
    figure = plots.scores_per_layer(PLAN, {"blocks.0.heads": np.array(scores)}, "fisher")
    plots.png(figure)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    shown = {t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high}
    assert axes.get_yscale() == "log" and labels <= shown, shown
