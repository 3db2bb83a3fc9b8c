"""Holding predictions against measurements: what scores say of single units, and what single layers say of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.base import Plan
from prune.gates import gated, undisturbed
from prune.sensitivity.curves import Curve, spearman_of
from prune.sensitivity.passes import SuffixPasses

Row = Mapping[str, Any]
DRAWS = 200


def curves_of(rows: Sequence[Row], quantity: str = "loss_change") -> dict[str, Curve]:
    """The curve of every part that was swept."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["part"], []).append((row["ratio"], row[quantity]))
    return {
        name: Curve(*(tuple(column) for column in zip(*sorted(found), strict=True))) for name, found in points.items()
    }


def validated(ablation: Sequence[Row]) -> list[dict[str, Any]]:
    """Rank correlation of each score with the measured change, over all sets of units of a kind.

    Beside it the value that 95% of random scores stay below: a score that does not exceed it
    predicts no better than chance.

    Args:
        ablation: Rows with `kind`, `predicted` (by score) and `loss_change`.
    """
    found = []
    for kind in dict.fromkeys(row["kind"] for row in ablation):
        rows = [row for row in ablation if row["kind"] == kind]
        measured = [row["loss_change"] for row in rows]
        chance = chance_level(measured)
        for score in rows[0]["predicted"]:
            value = spearman_of([row["predicted"][score] for row in rows], measured)
            beats = value is not None and chance is not None and value > chance
            found.append({
                "kind": kind, "score": score, "spearman": value, "chance": chance, "sets": len(rows),
                "beats_random": beats,
            })  # fmt: skip
    return found


def chance_level(measured: Sequence[float], draws: int = DRAWS) -> float | None:
    """The rank correlation that 95% of random scores stay below; None where there is too little to rank."""
    generator = torch.Generator().manual_seed(0)
    found = [spearman_of(torch.rand(len(measured), generator=generator).tolist(), measured) for _ in range(draws)]
    values = sorted(value for value in found if value is not None)
    return values[int(0.95 * len(values))] if values else None


def cross_effect(model: PrunableModel, data: DataBundle, batches: Sequence[Batch], plan: Plan) -> dict[str, float]:
    """The sum of the losses of each layer's cut by itself, and the loss of all of them together.

    Args:
        model: The dense model; left as it was.
        data: The task.
        batches: What is answered.
        plan: Its kept units are tried, group by group and at once, as masks.
    """
    gates = {}
    for group in plan.groups:
        if len(group.kept) < group.count:
            gates[group.name] = torch.zeros(group.count)
            gates[group.name][list(group.kept)] = 1.0
    layers = {group.name: group.layer for group in plan.groups}
    with undisturbed(model.network):
        passes = SuffixPasses(model, batches, data.task)
        with gated(model, gates):
            joint = passes.measure()
        single = 0.0
        for name in sorted(gates, key=lambda name: layers[name]):
            passes.go_to(layers[name])
            with gated(model, {name: gates[name]}):
                single += passes.measure().loss - passes.dense.loss
    change = joint.loss - passes.dense.loss
    return {"sum_of_layers": single, "joint": change, "gap": change - single, "joint_divergence": joint.divergence}
