"""No recovery: measure the model as the cut left it."""

from dataclasses import dataclass

from data.base import DataBundle
from models.base import PrunableModel
from prune.recovery.base import Recovered
from utils.storage import Store


@dataclass(frozen=True)
class NoRecovery:
    """Leaves the pruned model alone."""

    def recover(
        self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, store: Store, seed: int
    ) -> Recovered:
        """Return the pruned model itself."""
        return Recovered(pruned)
