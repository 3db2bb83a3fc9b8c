"""First-order Taylor scores: the loss change that the gradient predicts for removing a unit.

`w` a weight, `g_b` its gradient in calibration batch b, sums over the unit's columns of its
consumer. For any data `signed <= batch <= abs`, unit by unit.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from prune.base import Scores
from prune.gates import calibration_of, gate_gradients, loss_gradients, undisturbed
from prune.structural import Structural
from utils.distributed import divided
from utils.memory import Portions
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
    portions = Portions("taylor_abs")
    with undisturbed(model.network), progress_bar("taylor_abs", len(batches)) as advance:

        def terms(batch: Batch) -> tuple[dict[str, Tensor], None]:
            for weight in weights:
                weight.requires_grad_(True)
            gradients = loss_gradients(model, data.task, batch, weights, portions) if weights else ()
            advance("")
            products = zip(groups, weights, gradients, strict=True)
            return {g.name: column_sums(w.detach() * gradient, g).cpu() for g, w, gradient in products}, None

        for found, _ in divided(batches, terms):
            for name, values in found.items():
                sums[name] += values
    return sums
