"""First-order scores of single weights: pure functions of a weight and what is summed over batches.

`w` a weight, `g_b` its gradient of the mean loss of calibration batch b. For any data `taylor_signed <= taylor`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.gates import calibration_of, loss_gradients, undisturbed
from prune.weights.matrices import Matrix, linear_of
from utils.distributed import divided
from utils.memory import Portions
from utils.progress import progress_bar

WeightScore = Literal["magnitude", "taylor", "taylor_signed", "fisher", "random"]
Sums = Callable[[Tensor], Tensor]
BY_GRADIENT: Mapping[str, Sums] = {"taylor": torch.abs, "taylor_signed": torch.clone, "fisher": torch.square}


def taylor_abs(weight: Tensor, absolute: Tensor) -> Tensor:
    """`sum_b |w g_b|`, from `sum_b |g_b|`."""
    return weight.float().abs() * absolute


def taylor_signed(weight: Tensor, total: Tensor) -> Tensor:
    """`|w sum_b g_b|`, from `sum_b g_b`: batches cancel near a minimum."""
    return weight.float().abs() * total.abs()


def fisher(weight: Tensor, squares: Tensor) -> Tensor:
    """`sum_b (w g_b)^2`, from `sum_b g_b^2`: the loss that the diagonal of the empirical Fisher predicts."""
    return weight.float().square() * squares


def gradient_sums(model: PrunableModel, data: DataBundle, matrices: Sequence[Matrix], of: Sums) -> dict[str, Tensor]:
    """Sum a function of each batch's gradient over the calibration batches.

    Args:
        model: The model; left exactly as it was.
        data: Source of the batches and the loss.
        matrices: The linears.
        of: What of a gradient is summed.

    Returns:
        Per linear (O, I), float32, on the model's device.

    Raises:
        InputError: If there is no calibration data.
    """
    batches = calibration_of(data).calibration
    weights = [linear_of(model.network, matrix.name).weight for matrix in matrices]
    names = [matrix.name for matrix in matrices]
    sums = {n: torch.zeros_like(weight, dtype=torch.float32) for n, weight in zip(names, weights, strict=True)}
    portions = Portions("weight gradients")
    with undisturbed(model.network), progress_bar("weight gradients", len(batches)) as advance:

        def terms(batch: Batch) -> tuple[dict[str, Tensor], None]:
            for weight in weights:
                weight.requires_grad_(True)
            gradients = loss_gradients(model, data.task, batch, weights, portions)
            advance("")
            return {name: of(g.detach().float()) for name, g in zip(sums, gradients, strict=True)}, None

        for found, _ in divided(batches, terms, in_rounds=True):
            for name, values in found.items():
                sums[name] += values.to(sums[name].device)
    return sums


def weight_scores(
    model: PrunableModel, data: DataBundle, matrices: Sequence[Matrix], score: WeightScore, seed: int = 0
) -> dict[str, Tensor]:
    """Score every weight of some linears; higher means keep.

    Args:
        model: The model; left exactly as it was.
        data: Looked at by `taylor`, `taylor_signed` and `fisher`.
        matrices: The linears.
        score: Which score.
        seed: Of the random one.

    Returns:
        Per linear (O, I), float32, CPU.
    """
    weights = {matrix.name: linear_of(model.network, matrix.name).weight.detach() for matrix in matrices}
    if not weights:
        return {}
    if score == "magnitude":
        return {name: weight.float().abs().cpu() for name, weight in weights.items()}
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    sums = gradient_sums(model, data, matrices, BY_GRADIENT[score])
    rule = {"taylor": taylor_abs, "taylor_signed": taylor_signed, "fisher": fisher}[score]
    return {name: rule(weights[name], total).cpu() for name, total in sums.items()}
