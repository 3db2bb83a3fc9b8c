"""Post-training pruning of Kwon et al. (NeurIPS 2022, arXiv:2204.09656): search, rearrangement, mask tuning."""

from dataclasses import dataclass
from typing import Any, ClassVar

from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Method, Scores
from prune.rankers.fisher import fisher
from prune.repair.gradients import GateGradients, stacked
from prune.repair.repairs import Repair
from prune.structural import Search, Structural
from utils.rules import Count, Seed, Whole
from utils.storage import Scratch


@dataclass(frozen=True, kw_only=True)
class Kwon(Structural):
    """Fisher information of the gates over mini-batches, the two-kind search, then rearrangement and mask tuning.

    `rearrange=false` and `repair=[]` take the last two steps away; `repair` can name others as well.

    Attributes:
        batch_size: Samples of a mini-batch, whose gradients are squared after their mean: scores depend on it. None
            takes the calibration batches as they are.
        replacement: Draw the samples with replacement, as the released code does.
        seed: Of that draw.
    """

    batch_size: Count | None = None
    replacement: bool = False
    seed: Seed = 0
    min_keep: Whole = 0
    search: Search = "optin"
    rearrange: bool = True
    repair: tuple[Repair, ...] = ("gates",)

    looks_at_data: ClassVar[bool] = True

    def ranking_settings(self) -> dict[str, Any]:
        """How samples are grouped; a seed matters to a draw alone."""
        return self.gradients().ranking_settings()

    def base(self, model: PrunableModel, data: DataBundle) -> Method | None:
        """The gradients of all mini-batches, which rearrangement needs as well."""
        return self.gradients()

    def rank_from(self, base: Scores, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Sum the squared gradients."""
        return Scores({"fisher": {name: fisher(values) for name, values in stacked(base).items()}})

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Diagonal of the empirical Fisher over mini-batches."""
        return self.rank_from(self.gradients().rank(model, data), model, data, None)

    def gradients(self) -> GateGradients:
        """Those of its own mini-batches."""
        return GateGradients(batch_size=self.batch_size, replacement=self.replacement, seed=self.seed)
