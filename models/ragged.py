"""Samples of unequal length without padding: their tokens in one packed buffer, one sample after the other.

`packing_of(mask)` says where the tokens lie, `pack` and `unpack` go between (B, T, ...) and (N, ...), `kept`
drops tokens from a packed buffer, `segment_mean` pools, `ragged_attention` lets tokens attend within their own
sample (`models/ragged_attention.py`). Linears, norms and activations need nothing: they take (N, D) as it is.
Nothing here waits for a GPU where the number of tokens is known on the host (`total`, or a mask on the CPU).

Shapes: B samples, T tokens of the longest with its padding, N = sum of the lengths, D width.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.ragged_attention import ragged_attention

__all__ = [
    "Packing", "cumulative", "kept", "narrowed", "pack", "packing_of", "packing_of_lengths", "ragged_attention",
    "segment_mean", "unpack",
]  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Where packed tokens come from and which sample each one belongs to.

    Attributes:
        index: Position of each packed token among the B*T padded ones, (N,), int64, ascending.
        cu_seqlens: Where each sample starts in the packed buffer, and N at the end, (B + 1,), int32.
        longest: No sample is longer; a number on the host. A larger one than needed costs little.
        tokens: T of the padded layout.
    """

    index: Tensor
    cu_seqlens: Tensor
    longest: int
    tokens: int

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.cu_seqlens.ndim != 1 or self.cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"index has shape {tuple(self.index.shape)}, cu_seqlens {tuple(self.cu_seqlens.shape)} of "
                f"{self.cu_seqlens.dtype}; they must be (N,) and (B + 1,) of torch.int32"
            )

    @property
    def samples(self) -> int:
        """Number of samples, B."""
        return len(self.cu_seqlens) - 1

    @property
    def total(self) -> int:
        """Number of packed tokens, N."""
        return len(self.index)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sample, (B,), int32."""
        return self.cu_seqlens.diff()

    @cached_property
    def host_lengths(self) -> list[int]:
        """The same as numbers on the host; a GPU is waited for, so only the CPU's attention asks."""
        return self.lengths.tolist()

    @cached_property
    def sample_of(self) -> Tensor:
        """Which sample each packed token belongs to, (N,), int64."""
        rows = torch.arange(self.samples, device=self.index.device)
        return rows.repeat_interleave(self.lengths, output_size=self.total)

    @cached_property
    def first(self) -> Tensor:
        """Where each sample's first token lies in the buffer, (B,), int64; of no use for an empty sample."""
        return self.cu_seqlens[:-1].long()


def cumulative(lengths: Tensor) -> Tensor:
    """Where each sample starts, and the sum at the end: (B,) -> (B + 1,), int32."""
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def packing_of(mask: Tensor, total: int | None = None) -> Packing:
    """Describe the tokens that a mask keeps.

    Args:
        mask: Nonzero where there is a token, (B, T); padding may lie anywhere.
        total: Its number of tokens where that is known on the host. Left out, a GPU is waited for.

    Raises:
        ValueError: If the mask is not (B, T).
    """
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be (B, T)")
    there = mask != 0
    return Packing(_positions(there.flatten(), total), cumulative(there.sum(dim=1)), mask.shape[1], mask.shape[1])


def packing_of_lengths(lengths: Tensor, tokens: int, total: int | None = None) -> Packing:
    """Describe samples whose tokens come first and whose padding comes last.

    Args:
        lengths: Tokens of each sample, (B,), integers of at most `tokens`.
        tokens: Tokens of the padded layout, T.
        total: Their sum where that is known on the host.
    """
    return packing_of(torch.arange(tokens, device=lengths.device) < lengths[:, None], total)


def pack(x: Tensor, packing: Packing) -> Tensor:
    """Take the tokens out of a padded tensor: (B, T, ...) -> (N, ...)."""
    if x.shape[:2] != (packing.samples, packing.tokens):
        raise ValueError(f"x has shape {tuple(x.shape)}; it must begin with ({packing.samples}, {packing.tokens})")
    return x.flatten(0, 1).index_select(0, packing.index)


def unpack(x: Tensor, packing: Packing) -> Tensor:
    """Put packed tokens back where they came from: (N, ...) -> (B, T, ...), zeros elsewhere."""
    _refuse_misfit(x, packing)
    padded = x.new_zeros(packing.samples * packing.tokens, *x.shape[1:])
    return padded.index_copy(0, packing.index, x).unflatten(0, (packing.samples, packing.tokens))


def kept(x: Tensor, packing: Packing, keep: Tensor, total: int | None = None) -> tuple[Tensor, Packing]:
    """Drop tokens from a packed buffer; those that stay keep their order.

    Args:
        x: Packed tokens, (N, ...).
        packing: What they are.
        keep: Which of them stay, (N,), bool.
        total: How many stay where that is known on the host. Left out, a GPU is waited for.

    Returns:
        The tokens that stay, (N', ...), and what they are; they still unpack to where they came from.
    """
    _refuse_misfit(x, packing)
    chosen = _positions(keep, total)
    return x.index_select(0, chosen), narrowed(packing, keep, chosen)


def narrowed(packing: Packing, keep: Tensor, chosen: Tensor) -> Packing:
    """The packing of the tokens that stay, (N,) bool and (N',) positions of the same; for several tensors at once."""
    before = pad(keep.cumsum(0, dtype=torch.int32), (1, 0))  # tokens that stay in front of each, (N + 1,)
    starts = before.index_select(0, packing.cu_seqlens)
    return replace(packing, index=packing.index.index_select(0, chosen), cu_seqlens=starts)


def segment_mean(x: Tensor, packing: Packing) -> Tensor:
    """Mean over each sample's own tokens: (N, D) -> (B, D); zeros for a sample without any."""
    _refuse_misfit(x, packing)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_zeros(packing.samples, *x.shape[1:], dtype=wide).index_add(0, packing.sample_of, x.to(wide))
    return (sums / packing.lengths.clamp(min=1).view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def _refuse_misfit(x: Tensor, packing: Packing) -> None:
    if len(x) != packing.total:
        raise ValueError(f"x has {len(x)} rows; it must have {packing.total}, one a packed token")


def _positions(keep: Tensor, total: int | None) -> Tensor:
    """Ascending positions of the true entries, (N,) -> (total,)."""
    if total is None:
        return keep.nonzero().flatten()
    # a stable sort puts the true entries first, in order, and its shape needs no look at the data
    return keep.logical_not().to(torch.uint8).argsort(stable=True)[:total]
