"""Optimal brain surgeon: what the answers lose when a unit goes and its consumer is refitted to what is left."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

import prune.repair.normal
import prune.repair.rows
from data.base import DataBundle
from models.base import PrunableModel, UnitGroup
from prune.base import Scores
from prune.obs import curvature, removal
from prune.obs.curvature import curvatures
from prune.obs.removal import removal_costs
from prune.repair.rows import Reader, readers
from prune.structural import Structural
from utils.rules import NonNegative, Seed

# a head takes its part in what later layers attend to with it, which the curvature of one layer does not see:
# measured on train images that no figure is reported on (docs/results.md)
ATTENTION = 2.0


@dataclass(frozen=True, kw_only=True)
class Obs(Structural):
    """Costs of removal under a Kronecker-factored Fisher information of the answers. No labels.

    Units of a group are scored in the order in which they go, each by what is lost on top of those before it; a
    consumer that is not refitted afterwards (`repair: [refit]`) loses more.

    Attributes:
        damping: Added to the second moments of what a consumer reads, as a part of their mean.
        seed: Of the random probes of the divergence.
    """

    damping: NonNegative = 0.01
    seed: Seed = 0

    ranking_code: ClassVar[tuple[ModuleType, ...]] = (curvature, removal, prune.repair.normal, prune.repair.rows)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """One forward and one backward pass a batch, then the removal of all units of every group."""
        found, consumers = curvatures(model, data, self.seed), readers(model, "prune=obs")
        scores = {}
        for group in model.unit_groups():
            seen = found.get(group.consumer.module)
            if seen is None or not group.count:
                scores[group.name] = torch.zeros(group.count)
                continue
            if not (seen.inputs.isfinite().all() and seen.outputs.isfinite().all()):
                scores[group.name] = torch.full((group.count,), torch.nan)  # no factorisation: refused by name below
                continue
            reader = consumers[group.consumer.module]
            costs = removal_costs(seen.inputs, seen.outputs, reader.matrix(), columns_of(reader, group), self.damping)
            scores[group.name] = costs * seen.rows * (ATTENTION if group.pairwise_features else 1.0)
        return Scores({"obs": scores})

    def ranking_settings(self) -> dict[str, Any]:
        """Damping and seed."""
        return {"damping": self.damping, "seed": self.seed}


def columns_of(reader: Reader, group: UnitGroup) -> Tensor:
    """Columns of a consumer that each unit of a group gives, (count, width times the kernel's window)."""
    start = 0
    for other in reader.groups:
        if other.name == group.name:
            break
        start += other.count
    owners = reader.units() - start
    order = owners.argsort(stable=True)
    mine = order[(owners[order] >= 0) & (owners[order] < group.count)]
    return mine.view(group.count, -1)
