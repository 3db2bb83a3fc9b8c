"""How much a neuron matters by the weights that make and read it: pure functions.

Shapes: N neurons, I inputs, O outputs. A neuron of a gated MLP has two rows: in the gate's weight and
in the up projection's; one of a plain MLP has one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def peak_to_peak(rows: Tensor) -> Tensor:
    """`max + |min|` of each row, (N, I) to (N,) in float32."""
    values = rows.float()
    return values.amax(dim=1) + values.amin(dim=1).abs()


def peak_to_peak_score(rows: Sequence[Tensor]) -> Tensor:
    """Sum of `max + |min|` over a neuron's rows, each (N, I); returns (N,)."""
    return torch.stack([peak_to_peak(each) for each in rows]).sum(dim=0)


def variance_score(rows: Sequence[Tensor]) -> Tensor:
    """Sum of the variances (unbiased) of a neuron's rows, each (N, I); returns (N,)."""
    return torch.stack([each.float().var(dim=1) for each in rows]).sum(dim=0)


def l1_score(rows: Sequence[Tensor]) -> Tensor:
    """Product of the L1 norms of a neuron's rows, each (N, I); returns (N,)."""
    return torch.stack([each.float().abs().sum(dim=1) for each in rows]).prod(dim=0)


def l2_score(rows: Sequence[Tensor]) -> Tensor:
    """Sum of the L2 norms of a neuron's rows, each (N, I); returns (N,)."""
    return torch.stack([each.float().norm(dim=1) for each in rows]).sum(dim=0)


def wanda_score(columns: Tensor, norms: Tensor) -> Tensor:
    """`||x_n|| ||W_n||`: what a neuron gives, times the column that reads it.

    Args:
        columns: Of the reading weight, one a neuron, (N, O).
        norms: L2 norm of what each neuron gave over all tokens, (N,).

    Returns:
        (N,), float32.
    """
    return norms.float() * columns.float().norm(dim=1)


def data_driven_score(rows: Sequence[Tensor], columns: Tensor, norms: Tensor) -> Tensor:
    """Peak-to-peak ranges of rows and column, each divided by its largest over neurons, summed, times `||x_n||`.

    Args:
        rows: A neuron's rows, each (N, I).
        columns: Of the reading weight, one a neuron, (N, O).
        norms: L2 norm of what each neuron gave over all tokens, (N,).

    Returns:
        (N,), float32.
    """
    ranges = [peak_to_peak(each) for each in (*rows, columns)]
    return norms.float() * torch.stack([each / _nonzero(each.max()) for each in ranges]).sum(dim=0)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
