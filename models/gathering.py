"""Taking tokens out of a batch: padded, masked, and what stands for those that go. Pure functions.

Shapes: B samples, T tokens, W tokens of the longest sample that is left, D width.
"""

from typing import Literal

import torch
from torch import Tensor


def kept_first(keep: Tensor, width: int) -> Tensor:
    """Positions of the kept tokens in their order, then of dropped ones: (B, T) bool -> (B, W)."""
    return (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: (B, T, ...) by (B, W) -> (B, W, ...)."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(shape))


def first_of(counts: Tensor, width: int) -> Tensor:
    """The first `counts` of `width` places: (B,) -> (B, W) bool."""
    return torch.arange(width, device=counts.device) < counts[:, None]


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its logits so that no token is mixed from invalid ones: (B, T) -> (B, 1, 1, T)."""
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, -torch.inf)
    return bias[:, None, None, :]


def fused(x: Tensor, weights: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """One token for those that go: the sum `w_j x_j`, or the same divided by the sum of `w_j`.

    Args:
        x: Tokens, (B, T, D).
        weights: Not negative, 0 for tokens that stay, (B, T).
        how: A mean of tokens without weight is 0.

    Returns:
        (B, 1, D) in the type of `x`.
    """
    total = weights.unsqueeze(1).to(torch.promote_types(x.dtype, torch.float32)) @ x.to(
        torch.promote_types(x.dtype, torch.float32)
    )  # (B, 1, T) @ (B, T, D) -> (B, 1, D)
    if how == "mean":
        total = total / weights.sum(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    return total.to(x.dtype)


def mean_of_valid(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens of each sample: (B, T, D) -> (B, D)."""
    # not a product with the mask: what lies in the padding may be infinite
    kept = x.masked_fill(~valid.unsqueeze(-1), 0)
    return (kept.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / valid.sum(1, keepdim=True)).to(x.dtype)
