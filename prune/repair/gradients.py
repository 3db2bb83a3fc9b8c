"""Gate gradients of single mini-batches, kept like a ranking: Fisher information and rearrangement need them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Plan, Scores
from prune.gates import calibration_of, gate_gradients
from prune.ranking import ranked
from prune.repair.batches import regrouped
from utils.rules import Count, Seed
from utils.storage import Store


@dataclass(frozen=True, kw_only=True)
class GateGradients:
    """One term a mini-batch: the gradient of its mean loss with respect to every gate. It chooses nothing.

    Attributes:
        batch_size: Samples of a mini-batch; None takes the calibration batches as they are.
        replacement: Draw as many samples as there are, with replacement, by the seed.
        seed: Of that draw.
    """

    batch_size: Count | None = None
    replacement: bool = False
    seed: Seed = 0

    ranks: ClassVar[bool] = True
    looks_at_data: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Short name for files."""
        return "gradients"

    def check(self, costs: CostModel) -> None:
        """Nothing can be unreachable."""

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """The full plan."""
        return Plan.of(model, {})

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """The model itself."""
        return model

    def ranking_settings(self) -> dict[str, Any]:
        """How samples are grouped; a seed matters to a draw alone."""
        return {
            "batch_size": self.batch_size,
            "replacement": self.replacement,
            "seed": self.seed if self.replacement else None,
        }

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Gradients of all mini-batches, in the order of the samples."""
        found = gate_gradients(model, self.grouped(data), "gradients")
        count = len(next(iter(found.values()), torch.zeros(0, 0)))
        return Scores({f"batch_{b:05}": {name: values[b] for name, values in found.items()} for b in range(count)})

    def grouped(self, data: DataBundle) -> DataBundle:
        """The data with calibration samples in mini-batches of this size and order."""
        batches = calibration_of(data).calibration
        if self.batch_size is None and not self.replacement:
            return data
        count = sum(len(next(iter(batch.values()))) for batch in batches)
        size = self.batch_size or max(len(next(iter(batch.values()))) for batch in batches)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randint(count, (count,), generator=generator) if self.replacement else None
        return replace(data, calibration=regrouped(batches, size, order))


def stacked(scores: Scores) -> dict[str, Tensor]:
    """What `GateGradients` keeps as one matrix a unit group, (batches, count)."""
    terms = [scores.terms[name] for name in sorted(scores.terms)]
    return {group: torch.stack([term[group] for term in terms]) for group in terms[0]} if terms else {}


def kept_gradients(how: GateGradients, model: PrunableModel, data: DataBundle, store: Store) -> dict[str, Tensor]:
    """The gradients, from storage where they are there: per unit group (batches, count)."""
    return stacked(ranked(how, model, data, store).scores)
