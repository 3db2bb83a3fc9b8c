"""What calibration tells of a linear's input: norms of its features, or their Gram matrix.

Sums over tokens, so that the batch size does not matter. Shapes: N tokens, I input features.
"""

from typing import Protocol

import torch
from torch import Tensor

from data.base import Batch
from prune.optin.precision import computed_in, in_float32

# columns of a Gram matrix that are computed together
STRIPE = 512


class Statistic(Protocol):
    """A running sum over the tokens that a linear reads."""

    tokens: int

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        ...

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        ...


class SquaredNorms:
    """Sum of squares per input feature."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums = torch.zeros(())

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        # the norm widens half precision as it reads; the running sum is wide enough for any number of batches
        squares = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).double().square()
        self._sums = self._sums.to(squares.device) + squares
        self.tokens += len(inputs)

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        return (self._sums / max(self.tokens, 1)).sqrt().float()


class Gram:
    """Sum of products of every two input features."""

    def __init__(self) -> None:
        self.tokens = self.samples = 0
        self._sums: Tensor | None = None

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        if self._sums is None:
            self._sums = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
        x = inputs.float()
        with computed_in("float32", x.device), in_float32(x.device):
            for start in range(0, x.shape[1], STRIPE):  # the upper triangle alone: the lower one is its mirror
                stop = start + STRIPE
                self._sums[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.tokens += len(inputs)
        self.samples += samples

    def gram(self) -> Tensor:
        """`(2 / samples) * sum of x x^T`, (I, I), float32."""
        assert self._sums is not None
        upper = self._sums.triu()
        return (upper + upper.triu(1).T) * (2 / max(self.samples, 1))

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        assert self._sums is not None
        return (self._sums.diagonal() / max(self.tokens, 1)).sqrt()


def tokens_of(inputs: Tensor, batch: Batch) -> Tensor:
    """The tokens of a linear's input that are no padding, (N, I).

    Args:
        inputs: (B, T, I), or (B*T, I), or any shape where padding has no place.
        batch: Its `attention_mask`, (B, T), tells padding; without one, all tokens count.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])  # (..., I) -> (N, I)
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or len(flat) != mask.numel():
        return flat
    return flat[mask.flatten().bool().to(flat.device)]
