"""Mask tuning of Kwon et al. (NeurIPS 2022, arXiv:2204.09656): a scale for every unit that is left, by least squares.

The scales s of a consumer's units are to give `min |A s - b|^2`: A has a column a unit, its part of the consumer's
output over all rows and outputs; b is what is wanted less the bias. With X the rows that the consumer reads and W its
weights, `A^T A` sums `(W W^T) * (X^T X)` over the columns of every two units, and `A^T (b - A 1)` sums
`W * (X^T r)`, r the residuals at scales of one, so that A is never made.
"""

import torch
from torch import Tensor

from prune.repair.normal import Normal

DAMP, LARGEST = 1.0, 10.0


def gate_equations(normal: Normal, matrix: Tensor, units: Tensor, count: int, intercept: bool) -> tuple[Tensor, Tensor]:
    """Normal equations of the scales around one.

    Args:
        normal: Sums over rows and residuals.
        matrix: The consumer's weights, (k, D), float64.
        units: The unit of each column, (k,); -1 for columns of none.
        count: Number of units.
        intercept: Add an unknown that all rows and outputs share, behind the units.

    Returns:
        `A^T A`, (n, n), and `A^T r`, (n,), float64; n is `count`, or one more.
    """
    owner = torch.zeros(len(units), count, dtype=torch.float64, device=matrix.device)
    owned = (units >= 0).nonzero().flatten().to(matrix.device)
    owner[owned, units.to(matrix.device)[owned]] = 1.0
    left = owner.T @ (matrix @ matrix.T * normal.gram[:-1, :-1]) @ owner
    right = owner.T @ (matrix * normal.cross[:-1]).sum(dim=1)
    if not intercept:
        return left, right
    with_ones = owner.T @ (matrix.sum(dim=1) * normal.gram[-1, :-1])  # (count,)
    ones = with_ones.new_tensor([normal.rows * matrix.shape[1]])
    left = torch.cat([torch.cat([left, with_ones[:, None]], dim=1), torch.cat([with_ones, ones])[None]])
    return left, torch.cat([right, normal.cross[-1].sum()[None]])


def damped_solution(matrix: Tensor, right: Tensor, damp: float = DAMP) -> Tensor:
    """`argmin |matrix x - right|^2 + damp^2 |x|^2`, (n,): what LSMR converges to, solved at once.

    With the rest `e = right - matrix x`, the minimum has `matrix^T e = damp^2 x`: one linear system in e and x, whose
    condition is that of the matrix and not its square.

    Args:
        matrix: (n, n), float64.
        right: (n,).
        damp: At least 0.

    Returns:
        (n,); not finite where there is no single solution.
    """
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    system = torch.cat([torch.cat([one, matrix], dim=1), torch.cat([matrix.T, -(damp**2) * one], dim=1)])
    solution, info = torch.linalg.solve_ex(system, torch.cat([right, torch.zeros_like(right)]))
    return solution[len(right) :] if int(info) == 0 else torch.full_like(right, torch.nan)


def tuned_scales(
    normal: Normal, matrix: Tensor, units: Tensor, count: int, intercept: bool, damp: float = DAMP
) -> Tensor | None:
    """Scales of the units, (count,) float64; None if they can't be found or one is beyond 10 on either side."""
    left, right = gate_equations(normal, matrix, units, count, intercept)
    scales = 1 + damped_solution(left, right, damp)[:count]
    return scales if bool(scales.isfinite().all()) and bool((scales.abs() <= LARGEST).all()) else None
