"""The factor of an inverse, nearly all of whose work is products of matrices.

Shapes: n, the side of a symmetric matrix.
"""

from math import isfinite

import torch
from torch import Tensor

from prune.weights.products import linear, product

# matrices up to here are factored and inverted at once
SMALL = 128


def inverse_factored(h: Tensor) -> Tensor | None:
    """Upper triangular U of `H^-1 = U^T U`, or None if H is not positive definite.

    U is the inverse of the upper R of `H = R R^T`, which is Cholesky's factor with rows and columns
    reversed: one factorisation, and H is never inverted itself.

    Args:
        h: (n, n), float32, symmetric.

    Returns:
        (n, n), float32.
    """
    upper = torch.zeros_like(h)
    if h.device.type != "cpu":
        fine = _at_once(upper, h)  # a library factors as fast there, and each look at what it says waits
    else:
        fine = _by_halves(upper, h)
    return upper if fine and all(map(isfinite, map(float, upper.aminmax()))) else None


def _by_halves(found: Tensor, h: Tensor) -> bool:
    """Write U into zeros; whether H is positive definite.

    With H in quarters A, B, B^T, C: C is factored first, then what `B R^-T` leaves of A; R itself is never whole.
    """
    if len(h) <= SMALL:
        return _at_once(found, h)
    half = len(h) // 2
    first, last = found[:half, :half], found[half:, half:]
    if not _by_halves(last, h[half:, half:]):
        return False
    beside = linear(h[:half, half:], last)  # B R^-T, (n/2, n/2)
    if not _by_halves(first, h[:half, :half] - linear(beside, beside)):
        return False
    torch.neg(product(first, product(beside, last)), out=found[:half, half:])
    return True


def _at_once(found: Tensor, h: Tensor) -> bool:
    """The same by one factorisation."""
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(failed):
        return False
    found.copy_(_inverse(lower.flip(0, 1)))
    return True


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves."""
    if len(upper) <= SMALL:
        return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
    half = len(upper) // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = first @ -upper[:half, half:] @ last
    return found
