"""Activation-aware magnitude: a unit matters as much as its consumer makes of what it gives.

The score of a single weight is that of Wanda (Sun et al., ICLR 2024, arXiv:2306.11695), summed over a unit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.base import Batch, DataBundle
from models.base import PrunableModel, UnitGroup
from prune.base import Scores
from prune.gates import calibration_of, undisturbed
from prune.passes import in_fitting_batches
from prune.structural import Structural
from prune.weights.statistics import SquaredNorms, tokens_of
from utils.hooks import hooked
from utils.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Activation(Structural):
    """`sum over the unit's inputs j of its consumer of |x_j|_2 * sum_i |W_ij|`. No labels, no gradients."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """One forward pass a batch scores all units of all groups; padding does not count."""
        norms = in_fitting_batches(data, "activation", lambda data: input_norms(model, data))
        found = {g.name: activation_scores(model, g, norms.get(g.consumer.module)) for g in model.unit_groups()}
        return Scores({"activation": found})


def activation_scores(model: PrunableModel, group: UnitGroup, norms: Tensor | None) -> Tensor:
    """Scores of a group's units, (count,), float32, CPU.

    Args:
        model: The model.
        group: Says which inputs are whose.
        norms: Root mean square of every input feature of its consumer, (I,); None where it did not run.
    """
    weight = model.network.get_parameter(f"{group.consumer.module}.weight").detach().float()
    sums = weight.abs().movedim(group.consumer.weight_dim, 0).flatten(1).sum(dim=1)  # (I,)
    if norms is None:
        return torch.zeros(group.count)
    return (sums * norms.to(sums.device))[group.consumer.index.to(sums.device)].sum(dim=1).cpu()


@torch.no_grad()
def input_norms(model: PrunableModel, data: DataBundle) -> dict[str, Tensor]:
    """Root mean square of what each consumer reads, per input feature, (I,), float32."""
    axes = {g.consumer.module: g.consumer.channel_axis for g in model.unit_groups() if g.count}
    norms = {name: SquaredNorms() for name in axes}
    current: Batch = {}

    def watching(name: str):
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            features = args[0].movedim(axes[name], -1)  # (B, ..., I)
            norms[name].add(tokens_of(features, current), len(features))

        return hook

    batches = calibration_of(data).calibration
    hooks = [(model.network.get_submodule(name), watching(name)) for name in axes]
    with undisturbed(model.network), hooked(before=hooks), progress_bar("activation", len(batches)) as advance:
        for batch in batches:
            current = batch
            model.logits(model.place(batch))
            advance("")
    return {name: found.norms() for name, found in norms.items() if found.tokens}
