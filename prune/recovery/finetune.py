"""Fine-tuning: train what is left on the task's own loss."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.pretrained import task_loss
from prune.recovery.base import TrainedRecovery


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainedRecovery):
    """AdamW on the labels of the train split."""

    divides = True

    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[..., Tensor]:
        """The task's loss; the dense model is not looked at."""
        return task_loss(pruned, data, self)
