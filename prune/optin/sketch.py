"""OPTIN's losses of all units at once, estimated from a few backward passes.

MD is a squared distance of Grams with neither value nor gradient at the dense model, so its
leading term is the Gauss-Newton form. With an independent matrix of random signs V_z a feature
point, `s = sum_z <V_z, G_z>` and gates g of ones, `E[(ds/dg_j)^2] = sum_z ||dG_z/dg_j||_F^2`,
which is MD_j to that order. KD: where a sample has few logits their Jacobian is taken and the
divergence evaluated at `y - dy/dg_j`; where it has many, `xi = sqrt(p) e - p <sqrt(p), e>`
has the covariance of their Fisher information, so `E[(d<xi, y>/dg_j)^2] = 2 KD_j`.
"""

from collections.abc import Sequence

import torch

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from prune.gates import calibration_of, undisturbed
from prune.optin.exact import Losses, exact_losses
from prune.optin.graph import Dense, Graph, Responses, drawing
from prune.optin.precision import computed_in
from prune.optin.teacher import Settings
from utils.distributed import divided
from utils.memory import restarted
from utils.progress import progress_bar

EXACTLY = ("head",)


def sketched_losses(
    model: PrunableModel, data: DataBundle, settings: Settings, probes: int, leak: bool = False
) -> Losses:
    """Estimate the losses of every unit, and score the heads, which are few, exactly.

    Args:
        model: The dense model; left exactly as it was.
        data: Calibration batches and the task.
        settings: See `Settings`; the seed is also that of the probes.
        probes: Random probes a batch, R.
        leak: How heads are scored, see `exact_losses`.

    Returns:
        `md`, `kd`, and `md_final` where the model has a feature point behind its last block
        (its share is then in the estimated `md`); per group (count,).
    """
    batches = calibration_of(data).calibration
    losses = exact_losses(model, data, settings, kinds=EXACTLY, leak=leak)
    groups = [group for group in model.unit_groups() if group.count and group.kind not in EXACTLY]
    generator = torch.Generator().manual_seed(settings.seed)
    precision = computed_in(settings.precision, model.device)
    with undisturbed(model.network), precision, progress_bar("optin sketch", len(batches) * probes) as advance:
        for batch in batches:
            placed = model.place(batch)
            distances, deviations = estimated(model, data, placed, groups, settings, probes, generator)
            for name, values in distances.items():
                losses["md"][name] += values / len(batches)
            for name, values in deviations.items():
                losses["kd"][name] += settings.temperature**2 * values / len(batches)
            for _ in range(probes):
                advance("")
    return losses


Estimates = tuple[Responses, Responses]


def estimated(
    model: PrunableModel, data: DataBundle, batch: Batch, groups: Sequence[UnitGroup], settings: Settings,
    probes: int, generator: torch.Generator,
) -> Estimates:  # fmt: skip
    """Distances and divergences of every unit of some groups on one batch, (count,) each.

    Where memory runs out, samples are differentiated in parts. Every response is a sum over samples, so that with the
    same random numbers for every part it comes out the same.
    """
    state, samples = generator.get_state(), len(next(iter(batch.values())))

    def in_parts(size: int) -> Estimates:
        parts = [range(first, min(first + size, samples)) for first in range(0, samples, size)]
        dense = None if len(parts) == 1 else Dense.of(model, batch, settings, parts)
        distances: list[Responses] = []
        deviations: list[Responses] = []
        few = False
        for rows in parts:
            generator.set_state(state)
            graph = Graph(model, batch, groups, settings, dense, rows)
            drawn = drawing(graph.skip_distance_probe, probes, generator)
            distances = _added(distances, [found for found, _ in divided(drawn, graph.distance_probe)])
            few = graph.few_outputs
            found = graph.deviations(data) if few else graph.divergence_probes(data, max(4, probes // 4), generator)
            deviations = _added(deviations, found)
            del graph  # before the next one is made
        return mean_squares(distances), deviations[0] if few else mean_squares(deviations, 2)

    return restarted("optin sketch", samples, in_parts)


def _added(sums: list[Responses], found: list[Responses]) -> list[Responses]:
    """Responses to the same probes, of one part of the samples after the other."""
    if not sums:
        return found
    return [{name: total[name] + part[name] for name in total} for total, part in zip(sums, found, strict=True)]


def mean_squares(responses: Sequence[Responses], factor: int = 1) -> Responses:
    """Mean over the probes of their squared responses, divided by a factor."""
    names = responses[0] if responses else ()
    return {n: torch.stack([found[n] for found in responses]).square().mean(dim=0) / factor for n in names}
