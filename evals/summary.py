"""What `summary=true` and a sensitivity analysis leave beside the usual: pictures, a table, an allocation."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.plots import save_figure
from evals.weight_plots import curves_of_parts, heat_map, kept_rows, overall_distribution, weight_distributions
from models.base import PrunableModel
from prune.base import Plan
from prune.sensitivity.files import write_rows
from utils.files import write_atomically

COLUMNS: tuple[str, ...] = (
    "part", "kind", "layer", "ratio", "removed", "count", "loss_change", "divergence", "quality_change", "predicted",
    "macs", "params", "loss_per_mac", "loss_per_param",
)  # fmt: skip
Row = Mapping[str, Any]


def draw_summary(
    dense: PrunableModel, cut: PrunableModel, recovered: PrunableModel, plan: Plan, out: Path
) -> list[str]:
    """Draw weights before and after, and what was kept of each layer; paths relative to `out`."""
    models = {"dense": dense, "pruned": cut, "recovered": recovered}
    drawn = {
        "weights.png": overall_distribution(models), "weights_by_layer.png": weight_distributions(dense, recovered),
        "kept_rows.png": kept_rows(plan),
    }  # fmt: skip
    found = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in found.items():
        save_figure(figure, out / "plots" / name)
    return [f"plots/{name}" for name in found]


def leave_sensitivity(plan: Plan, out: Path) -> tuple[list[str], list[str]]:
    """Write the table, the pictures and the allocation of an analysis; returns plots and sections of the report."""
    measured = plan.details.get("sensitivity")
    if measured is None:
        return [], []
    rows = [priced(row) for row in measured["rows"]]
    write_atomically(out / "sensitivity.csv", _csv(rows).encode())
    facts = {name: measured[name] for name in ("model", "score", "samples")}
    write_rows(out / "allocation.json", rows, facts)
    drawn = {"sensitivity_map.png": heat_map(rows), "sensitivity_curves.png": curves_of_parts(rows)}
    for name, figure in drawn.items():
        save_figure(figure, out / "plots" / name)
    return [f"plots/{name}" for name in drawn], _sections(measured, rows)


def priced(row: Row) -> dict[str, Any]:
    """A row with its loss change per MAC and per parameter; for weights, which free none, per zero."""
    freed = row["params"] or (row["removed"] if row["kind"] == "weight" else 0)
    per_mac = row["loss_change"] / row["macs"] if row["macs"] else None
    return {**row, "loss_per_mac": per_mac, "loss_per_param": row["loss_change"] / freed if freed else None}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _sections(measured: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    dense, effect = measured["dense"], measured.get("cross_effect")
    lines = [
        "## Sensitivity",
        f"Measured on {measured['samples']} calibration samples, units and weights by {measured['score']}; dense loss "
        f"{dense['loss']:.4f}. The validation split was not looked at. All columns are in `sensitivity.csv`, the "
        "curves for other methods in `allocation.json` (`prune.allocation=<file>`).",
        _curve_table(rows),
    ]
    if measured["validation"]:
        lines += ["### What scores predict", _validation_table(measured["validation"])]
    if effect:
        lines.append(
            f"Cross-effect: the layers' losses one by one sum up to {effect['sum_of_layers']:+.4f}, together they are "
            f"{effect['joint']:+.4f}; the gap is {effect['gap']:+.4f} nat."
        )
    return lines


def _curve_table(rows: Sequence[Row]) -> str:
    """Loss changes of every part at the ratios that most of them have."""
    grid = sorted({round(row["ratio"], 1) for row in rows})
    lines = [
        f"| part | kind | block | {' | '.join(f'{ratio:g}' for ratio in grid)} |",
        f"|---|---|--:|{'--:|' * len(grid)}",
    ]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        by_ratio = {round(row["ratio"], 1): f"{row['loss_change']:+.4f}" for row in own}
        cells = [part, own[0]["kind"], str(own[0]["layer"]), *(by_ratio.get(ratio, "") for ratio in grid)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _validation_table(found: Sequence[Row]) -> str:
    lines = [
        "| kind | score | rank correlation | 95% of random scores stay below | sets | |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in found:
        numbers = ["n/a" if row[name] is None else f"{row[name]:.3f}" for name in ("spearman", "chance")]
        verdict = "" if row["beats_random"] else "no better than chance"
        lines.append(f"| {row['kind']} | {row['score']} | {numbers[0]} | {numbers[1]} | {row['sets']} | {verdict} |")
    return "\n".join(lines)
