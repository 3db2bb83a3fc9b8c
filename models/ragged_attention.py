"""Attention within each sample of a packed buffer; the cost is the sum of squared lengths.

On a CPU one call of `scaled_dot_product_attention` for each run of equally long samples, on views of the
buffer: of the ways measured (`benchmarks/tokens.py`) this was the fastest, before length buckets padded
within and far before nested tensors. On a GPU one kernel for all samples: `torch.nn.attention.varlen`, or
flash-attn; both take float16 and bfloat16. Other types there are padded for the attention alone.

Shapes: B samples, N packed queries, M packed keys, H heads, G key and value heads, dh and dv head widths.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from models.ragged import Packing

WIDEST = 256
OLDEST = (8, 0)  # compute capability that flash attention needs


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: "Packing",
    keys: "Packing | None" = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Let every token attend to the tokens of its own sample.

    Args:
        q: Queries, (N, H, dh).
        k: Keys, (M, G, dh); G divides H, and each key head serves H / G query heads in turn.
        v: Values, (M, G, dv).
        packing: Which sample each query belongs to.
        keys: Which sample each key belongs to; None means the same as the queries. A sample with queries
            and without keys gets zeros.
        scale: Factor on the logits; None means `dh ** -0.5`.
        dropout: Rate on the attention probabilities; on a GPU the varlen kernels are left when it is not 0.

    Returns:
        (N, H, dv).

    Raises:
        ValueError: If shapes do not fit each other or the packings.
    """
    keys = packing if keys is None else keys
    _refuse_misfit(q, k, v, packing, keys)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    if q.device.type == "cpu":
        return _by_runs(q, k, v, packing, keys, scale, dropout)
    if dropout == 0.0 and _varlen_fits(q, k, v) and (kernel := _varlen_kernel()) is not None:
        bounds = (packing.cu_seqlens, keys.cu_seqlens, packing.longest, keys.longest)
        return kernel(*_equal_heads(q, k, v, scale), *bounds)
    return _padded(q, k, v, packing, keys, scale, dropout)


def _refuse_misfit(q: Tensor, k: Tensor, v: Tensor, packing: "Packing", keys: "Packing") -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3 or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{shapes}: must be (N, H, dh), (M, G, dh), (M, G, dv)")
    if k.shape[1] and q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the {k.shape[1]} key heads must divide the {q.shape[1]} query heads")
    if (len(q), len(k)) != (packing.total, keys.total) or packing.samples != keys.samples:
        raise ValueError(
            f"{shapes}: the packings have {packing.total} queries of {packing.samples} samples and {keys.total} keys "
            f"of {keys.samples} samples"
        )


def _by_runs(
    q: Tensor, k: Tensor, v: Tensor, packing: "Packing", keys: "Packing", scale: float | None, dropout: float
) -> Tensor:
    runs = _runs(packing, keys)
    queries, there = [b * n for b, n, _ in runs], [b * m for b, _, m in runs]
    parts = zip(q.split(queries), k.split(there), v.split(there), strict=True)
    grouped = bool(k.shape[1] != q.shape[1])  # a tracer's sizes are tensors
    mixed = [
        _attend(samples, q_run, k_run, v_run, scale, dropout, grouped)
        for (samples, _, _), (q_run, k_run, v_run) in zip(runs, parts, strict=True)
    ]
    return torch.cat(mixed)


def _runs(packing: "Packing", keys: "Packing") -> list[tuple[int, int, int]]:
    """Runs of samples with as many queries and keys each: (samples, queries, keys)."""
    counts = zip(packing.host_lengths, keys.host_lengths, strict=True)
    return [(len(list(run)), n, m) for (n, m), run in groupby(counts)]


def _attend(
    samples: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, grouped: bool
) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    # (b * n, H, dh) -> (b, H, n, dh), all views
    q, k, v = (t.unflatten(0, (samples, -1)).transpose(1, 2) for t in (q, k, v))
    mixed = scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(0, 1)  # (b, H, n, dv) -> (b * n, H, dv)


def _varlen_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these types and widths, and run on this device."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < OLDEST:
        return False
    width = q.shape[-1]
    alike = width == v.shape[-1] and width % 8 == 0 and width <= WIDEST
    return alike and q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype


def _equal_heads(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """What every version of the kernels takes: as many key heads as query heads, and the usual scale."""
    usual = q.shape[-1] ** -0.5
    if scale is not None and scale != usual:
        q = q * (scale / usual)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return q, k, v


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Torch's kernel, else flash-attn's, else None; both take tensors, bounds and longest lengths in this order."""
    for module, name in (("torch.nn.attention.varlen", "varlen_attn"), ("flash_attn", "flash_attn_varlen_func")):
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


def _padded(
    q: Tensor, k: Tensor, v: Tensor, packing: "Packing", keys: "Packing", scale: float | None, dropout: float
) -> Tensor:
    """One call on (B, H, longest, dh); padding is masked out as a key and dropped as a query."""
    slots = _slots(packing)
    q_padded = _spread(q, slots, packing)
    k_padded, v_padded = (_spread(t, slots if keys is packing else _slots(keys), keys) for t in (k, v))
    there = torch.arange(keys.longest, device=q.device) < keys.lengths[:, None]  # (B, longest)
    # a sample without keys would give NaN, also to the gradient; it attends to zeros instead
    there = there | (keys.lengths == 0)[:, None]
    mixed = scaled_dot_product_attention(
        q_padded, k_padded, v_padded, attn_mask=there[:, None, None], scale=scale, dropout_p=dropout,
        enable_gqa=bool(k.shape[1] != q.shape[1]),
    )  # fmt: skip
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, slots)  # (B, H, longest, dv) -> (N, H, dv)


def _slots(packing: "Packing") -> Tensor:
    """Position of each packed token in (B * longest), with its sample's padding behind it, (N,)."""
    sample = packing.sample_of
    place = torch.arange(packing.total, device=sample.device) - packing.first.index_select(0, sample)
    return sample * packing.longest + place


def _spread(x: Tensor, slots: Tensor, packing: "Packing") -> Tensor:
    padded = x.new_zeros(packing.samples * packing.longest, *x.shape[1:]).index_copy(0, slots, x)
    return padded.unflatten(0, (packing.samples, packing.longest)).transpose(1, 2)  # (B, heads, longest, dh)
