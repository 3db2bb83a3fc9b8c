"""What calibration tells of a linear's input: norms of its features, or their Gram matrix.

Sums over tokens, so that the batch size does not matter. Shapes: N tokens, I input features.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from data.base import Batch
from prune.optin.precision import computed_in, in_float32
from prune.weights.products import linear
from utils.distributed import summed

# columns of a Gram matrix that are computed together
STRIPE = 256
# tokens that are worth a pass over a Gram matrix
ENOUGH = 1024


class Statistic(Protocol):
    """A running sum over the tokens that a linear reads."""

    tokens: int

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        ...

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        ...


@runtime_checkable
class Joining(Protocol):
    """A statistic whose sum over several processes of a run is that of a single one."""

    def join(self) -> None:
        """Add what the other processes of a run have taken in."""
        ...


class SquaredNorms:
    """Sum of squares per input feature."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums = torch.zeros(())

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        # wide enough for any number of batches
        self._sums = self._sums.to(inputs.device) + squares(inputs).double()
        self.tokens += len(inputs)

    def join(self) -> None:
        """Add what the other processes of a run have taken in."""
        found = summed({"sums": self._sums, "tokens": torch.tensor(self.tokens)})
        self._sums, self.tokens = found["sums"], int(found["tokens"])

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        return (self._sums / max(self.tokens, 1)).sqrt().float()


def squares(inputs: Tensor) -> Tensor:
    """Sum of squares of every feature of (N, I), (I,), in float32 whatever the inputs are in."""
    if inputs.device.type == "cpu":
        # a norm along the first dimension takes 30 times as long here
        return inputs.float().square().sum(dim=0)
    # elsewhere it widens as it reads, and needs no copy
    return torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square()


class Gram:
    """Sum of products of every two input features."""

    def __init__(self) -> None:
        self.tokens = self.samples = 0
        self._sums: Tensor | None = None
        self._waiting: list[Tensor] = []

    def add(self, inputs: Tensor, samples: int) -> None:
        """Take in the tokens (N, I) of some samples."""
        if self._sums is None:
            self._sums = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
        self.tokens += len(inputs)
        self.samples += samples
        if len(inputs) >= ENOUGH:
            self._multiply(inputs)
            return
        # few tokens at a time wait for others, as copies: what they were taken from may change
        self._waiting.append(inputs.clone())
        if sum(map(len, self._waiting)) >= ENOUGH:
            self._multiply_waiting()

    def gram(self) -> Tensor:
        """`(2 / samples) * sum of x x^T`, (I, I), float32."""
        found = self._summed() * (2 / max(self.samples, 1))
        for start in range(0, len(found), STRIPE):
            stop = start + STRIPE
            found[stop:, start:stop] = found[start:stop, stop:].T
        return found

    def norms(self) -> Tensor:
        """Root of the mean square of every feature, (I,), float32."""
        return (self._summed().diagonal() / max(self.tokens, 1)).sqrt()

    def _summed(self) -> Tensor:
        """All sums; below the stripes of the diagonal they are missing."""
        assert self._sums is not None
        self._multiply_waiting()
        return self._sums

    def _multiply_waiting(self) -> None:
        if self._waiting:
            self._multiply(torch.cat(self._waiting))
            self._waiting.clear()

    def _multiply(self, inputs: Tensor) -> None:
        assert self._sums is not None
        x = inputs.float()
        with computed_in("float32", x.device), in_float32(x.device):
            features = x.T.contiguous()  # (I, N)
            for start in range(0, len(features), STRIPE):  # the upper triangle alone: the lower one is its mirror
                stop = start + STRIPE
                self._sums[start:stop, start:] += linear(features[start:stop], features[start:])


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
    real = mask.flatten().bool()
    # a mask in main memory is looked at without waiting for the device
    return flat if bool(real.all()) else flat[real.nonzero().flatten().to(flat.device)]
