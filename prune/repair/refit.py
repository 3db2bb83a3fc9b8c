"""Least-squares reconstruction: the weights and bias of a consumer that give best what is wanted, by ridge."""

from typing import Protocol

import torch
from torch import Tensor

from prune.repair.normal import Normal
from utils.errors import RunError


class Settings(Protocol):
    """What is asked for."""

    @property
    def ridge(self) -> float:
        """Pull towards the present weights, in mean squares of the inputs."""
        ...


def refitted(normal: Normal, ridge: float, biased: bool) -> Tensor:
    """The change of weights and bias that makes up best for the residuals.

    `(X^T X + ridge * mean(diag(X^T X)) * I)^-1 X^T r`; the bias, a column of ones, is not pulled.

    Args:
        normal: Sums over calibration rows.
        ridge: Not negative; 0 takes the smallest of the best changes.
        biased: Whether there is a bias to change.

    Returns:
        (k + 1, D), float64; zeros in the last row without a bias.

    Raises:
        RunError: If a sum is not finite.
    """
    if not (normal.gram.isfinite().all() and normal.cross.isfinite().all()):
        raise RunError("refit: what a consumer reads on the calibration data is not finite")
    columns = len(normal.gram) - 1
    used = columns + int(biased)
    delta = torch.zeros_like(normal.cross)
    if used == 0 or normal.rows == 0:
        return delta
    pull = torch.zeros(used, dtype=torch.float64, device=normal.gram.device)
    if columns:
        pull[:columns] = ridge * normal.gram.diagonal()[:columns].mean()
    delta[:used] = _solved(normal.gram[:used, :used] + pull.diag(), normal.cross[:used])
    return delta


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` of a symmetric matrix without negative eigenvalues; the smallest solution if there are many."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # a factor of a singular matrix may be found by rounding alone
    sound = factor.diagonal().square() > 1e-12 * matrix.diagonal()
    if int(info) == 0 and bool(sound.all()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > 1e-10 * values[-1].clamp(min=0), 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))
