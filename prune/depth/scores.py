"""How far blocks turn what flows through them: pure functions.

Shapes: N tokens, B samples, T tokens a sample, D width, L blocks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from utils.errors import RunError


def cosines(before: Tensor, after: Tensor, where: str) -> Tensor:
    """Cosine of each row with the row beside it; no product of all rows with all.

    Args:
        before: (N, D).
        after: (N, D).
        where: What the rows are, for the message.

    Returns:
        (N,) in [-1, 1], float32.

    Raises:
        RunError: If one is NaN: a row of length 0, or one that is not finite, has no direction.
    """
    x, y = before.float(), after.float()
    found = (x * y).sum(dim=-1) / (x.norm(dim=-1) * y.norm(dim=-1))  # (N,)
    bad = found.isnan()
    if bool(bad.any()):
        raise RunError(
            f"{where}: {int(bad.sum())} of {len(found)} cosines are NaN; every state must be finite and longer than 0"
        )
    return found.clamp(-1, 1)


def angles(before: Tensor, after: Tensor, where: str) -> Tensor:
    """Angle between rows as a fraction of half a turn: `arccos(cos) / pi`, (N, D) twice to (N,) in [0, 1]."""
    return cosines(before, after, where).arccos() / math.pi


def last_tokens(batch: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Position of each sample's last token that is no padding, (B,).

    Args:
        batch: Its `attention_mask`, (B, T), tells padding; without one, all tokens count.
        states: (B, T, D).

    Raises:
        RunError: If a sample is nothing but padding, or the states are not one a token.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.full((len(states),), states.shape[1] - 1, device=states.device)
    if mask.shape != states.shape[:2]:
        raise RunError(
            f"states of shape {tuple(states.shape)} do not fit a mask of {tuple(mask.shape)}: run it unpacked"
        )
    real = mask.bool().to(states.device)
    if not bool(real.any(dim=1).all()):
        raise RunError("calibration: a sample is nothing but padding; every one needs a token")
    return (real * torch.arange(mask.shape[1], device=states.device)).argmax(dim=1)


def window_distances(stream: Tensor) -> dict[int, Tensor]:
    """Angular distance across every window of blocks, summed over samples (Gromov et al., 2024, arXiv:2403.17887).

    Args:
        stream: Each sample's state before every block and behind the last, (L + 1, B, D).

    Returns:
        Per number of blocks n from 1 to L - 1 the sums for windows that start at block 0, 1, …; (L - n + 1,), float64.
    """
    blocks = len(stream) - 1
    return {
        size: torch.stack([
            angles(stream[first], stream[first + size], f"blocks {first} to {first + size - 1}").double().sum()
            for first in range(blocks - size + 1)
        ]).cpu()
        for size in range(1, blocks)
    }  # fmt: skip
