"""Random scores: the control that every other method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Scores
from prune.structural import Structural
from utils.rules import Seed


@dataclass(frozen=True, kw_only=True)
class Random(Structural):
    """Scores drawn uniformly from [0, 1).

    Attributes:
        seed: Seed of the draw.
    """

    seed: Seed = 0

    looks_at_data: ClassVar[bool] = False

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Draw a score for every unit, group by group."""
        generator = torch.Generator().manual_seed(self.seed)
        return Scores({"random": {g.name: torch.rand(g.count, generator=generator) for g in model.unit_groups()}})
