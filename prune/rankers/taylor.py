"""First-order Taylor scores: the loss change that the gradient predicts for removing a unit.

`w` a weight, `g_b` its gradient in calibration batch b, sums over the unit's columns of its
consumer. For any data `signed <= batch <= abs`, unit by unit.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel, UnitGroup
from prune.base import Scores
from prune.gates import calibration_of, gate_gradients, undisturbed
from prune.structural import Structural
from utils.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Taylor(Structural):
    """First-order importance of every unit.

    Attributes:
        variant: `batch` is `sum_b |sum_w w g_b|`, through one gate a unit; `signed` is
            `|sum_b sum_w w g_b|`, in which batches cancel near a minimum; `abs` is
            `sum_w sum_b |w g_b|`, which needs the consumers' weight gradients.
    """

    variant: Literal["batch", "signed", "abs"] = "batch"

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score all units of all groups in one pass over the calibration batches."""
        if self.variant == "abs":
            return Scores({"taylor_abs": absolute_sums(model, data)})
        rule = taylor_batch if self.variant == "batch" else taylor_signed
        gradients = gate_gradients(model, data, self.name)
        return Scores({rule.__name__: {name: rule(values) for name, values in gradients.items()}})

    @property
    def name(self) -> str:
        """`taylor_batch`, `taylor_signed` or `taylor_abs`."""
        return f"taylor_{self.variant}"


def taylor_batch(gradients: Tensor) -> Tensor:
    """`sum_b |dL_b / dm_i|` of gate gradients (batches, count); returns (count,)."""
    return gradients.abs().sum(dim=0)


def taylor_signed(gradients: Tensor) -> Tensor:
    """`|sum_b dL_b / dm_i|` of gate gradients (batches, count); returns (count,)."""
    return gradients.sum(dim=0).abs()


def column_sums(products: Tensor, group: UnitGroup) -> Tensor:
    """Sum the absolute entries of each unit's slice of its consumer's weight.

    Args:
        products: Weight times gradient, shaped as the weight.
        group: Says which columns are whose.

    Returns:
        (count,), float32.
    """
    dim = group.consumer.weight_dim
    columns = products.float().abs().movedim(dim, 0).flatten(1).sum(dim=1)  # (features,)
    return columns[group.consumer.index.to(columns.device)].sum(dim=1)


def absolute_sums(model: PrunableModel, data: DataBundle) -> dict[str, Tensor]:
    """`sum_w sum_b |w g_b|` over each unit's columns of its consumer.

    Returns:
        Per unit group (count,), float32, CPU.
    """
    batches = calibration_of(data).calibration
    groups = [group for group in model.unit_groups() if group.count]
    weights = [model.network.get_parameter(f"{group.consumer.module}.weight") for group in groups]
    sums = {group.name: torch.zeros(group.count) for group in model.unit_groups()}
    with undisturbed(model.network), progress_bar("taylor_abs", len(batches)) as advance:
        for batch in batches:
            placed = model.place(batch)
            with torch.enable_grad():
                for weight in weights:
                    weight.requires_grad_(True)
                loss = data.task.loss(model.logits(placed), placed)
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True) if weights else ()
            for group, weight, gradient in zip(groups, weights, gradients, strict=True):
                sums[group.name] += column_sums(weight.detach() * gradient, group).cpu()
            advance("")
    return sums
