"""Fisher information of the gates: how sharply the loss reacts to each unit."""

from dataclasses import dataclass

from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Scores
from prune.gates import gate_gradients
from prune.structural import Structural


@dataclass(frozen=True, kw_only=True)
class Fisher(Structural):
    """Sum over calibration batches of the squared gate gradient."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """One forward and one backward pass a batch score all units of all groups."""
        gradients = gate_gradients(model, data, "fisher")
        return Scores({"fisher": {name: fisher(values) for name, values in gradients.items()}})


def fisher(gradients: Tensor) -> Tensor:
    """Diagonal of the empirical Fisher: `sum_b (dL_b / dm_i)^2`.

    Args:
        gradients: Of each batch's mean loss with respect to the gates, (batches, count).

    Returns:
        (count,)
    """
    return gradients.square().sum(dim=0)
