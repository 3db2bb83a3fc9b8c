"""Packed tokens against the plain way: one sample at a time, without padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, relu, scaled_dot_product_attention

from models.ragged import (
    Packing,
    kept,
    pack,
    packing_of,
    packing_of_lengths,
    ragged_attention,
    segment_mean,
    unpack,
)
from models.ragged_attention import _padded

HEADS, WIDTH = 4, 32
LENGTHS = {
    "unequal": [5, 9, 1, 7],
    "runs": [4, 4, 4, 6, 6],
    "one sample": [8],
    "one token": [1],
    "empty ones": [0, 3, 0, 0, 6, 0],
    "all empty": [0, 0],
}
Attend = Callable[[Tensor, Tensor, Tensor, Packing, Packing], Tensor]
WAYS: dict[str, Attend] = {
    "cpu": ragged_attention,
    # what a GPU falls back to where no kernel takes the type
    "padded": lambda q, k, v, packing, keys: _padded(q, k, v, packing, keys, None, 0.0),
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    """Attention from its formula, sample by sample and head by head."""
    found = torch.zeros(sum(lengths), q.shape[1], v.shape[2], dtype=q.dtype)
    queries_at = keys_at = 0
    for n, m in zip(lengths, keys, strict=True):
        for head in range(q.shape[1] if m else 0):
            shared = head * k.shape[1] // q.shape[1]
            mine, theirs = slice(queries_at, queries_at + n), slice(keys_at, keys_at + m)
            logits = q[mine, head] @ k[theirs, shared].T / q.shape[2] ** 0.5
            found[mine, head] = logits.softmax(dim=-1) @ v[theirs, shared]
        queries_at, keys_at = queries_at + n, keys_at + m
    return found


def layers(seed: int = 0) -> list[dict[str, Tensor]]:
    """Weights of two post-norm encoder layers."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH)}
    return [
        {name: drawn(*shape, seed=10 * i + j + seed) / WIDTH**0.5 for j, (name, shape) in enumerate(shapes.items())}
        for i in range(2)
    ]


def encoded(x: Tensor, weights: list[dict[str, Tensor]], attend: Callable[..., Tensor]) -> Tensor:
    """Two layers on tokens of any leading shape; `attend` takes (..., T, H, dh)."""
    for w in weights:
        q, k, v = (x @ w["qkv"].T).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        x = layer_norm(x + attend(q, k, v).flatten(-2) @ w["out"].T, (WIDTH,))
        x = layer_norm(x + relu(x @ w["up"].T) @ w["down"].T, (WIDTH,))
    return x


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packing_and_back_is_the_identity_on_tokens(lengths: list[int]) -> None:
    x, packing = drawn(len(lengths), 9, 3), packing_of_lengths(torch.tensor(lengths), 9)
    packed = pack(x, packing)
    assert torch.equal(packed, torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]))
    assert packing.lengths.tolist() == lengths == packing.host_lengths and packing.total == sum(lengths)
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.sample_of.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    expected = torch.stack([torch.cat([row[:n], torch.zeros(9 - n, 3)]) for row, n in zip(x, lengths, strict=True)])
    assert torch.equal(unpack(packed, packing), expected)


def test_padding_may_lie_anywhere() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    x = drawn(3, 4, 2)
    packing = packing_of(mask)
    assert torch.equal(pack(x, packing), x[mask.bool()])
    assert torch.equal(unpack(pack(x, packing), packing), x * mask[..., None])
    known = packing_of(mask, total=3)
    assert torch.equal(known.index, packing.index) and torch.equal(known.cu_seqlens, packing.cu_seqlens)


@pytest.mark.parametrize("known", [False, True])
def test_tokens_are_dropped_from_the_buffer_again_and_again(known: bool) -> None:
    x, lengths = drawn(4, 9, 3), [5, 9, 1, 7]
    packing = packing_of_lengths(torch.tensor(lengths), 9)
    packed, alive = pack(x, packing), torch.arange(9) < torch.tensor(lengths)[:, None]
    for seed in range(3):
        keep = torch.rand(packing.total, generator=torch.Generator().manual_seed(seed)) > 0.4
        alive = alive & unpack(keep, packing)
        packed, packing = kept(packed, packing, keep, int(keep.sum()) if known else None)
        assert torch.equal(packed, x[alive]) and packing.lengths.tolist() == alive.sum(1).tolist()
        assert torch.equal(unpack(packed, packing), x * alive[..., None])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_that_of_each_sample_by_itself(lengths: list[int], way: Attend) -> None:
    q, k, v = (drawn(sum(lengths), heads, 8, seed=s, dtype=torch.float64) for s, heads in enumerate((4, 4, 4)))
    packing = packing_of_lengths(torch.tensor(lengths), 9)
    if lengths == [0, 0]:
        assert ragged_attention(q, k, v, packing).shape == (0, 4, 8)
        return
    assert (way(q, k, v, packing, packing) - one_by_one(q, k, v, lengths, lengths)).abs().max() <= 1e-12


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_keys_may_differ_from_queries_and_be_shared_by_heads(way: Attend) -> None:
    lengths, keys = [3, 1, 0, 4, 2], [5, 2, 3, 0, 2]
    q, k, v = drawn(10, 6, 5, seed=1), drawn(12, 2, 5, seed=2), drawn(12, 2, 7, seed=3)
    packings = [packing_of_lengths(torch.tensor(counts), 6) for counts in (lengths, keys)]
    queries, theirs = packings
    found = way(q, k, v, queries, theirs)
    assert found.shape == (10, 6, 7)
    torch.testing.assert_close(found, one_by_one(q, k, v, lengths, keys), atol=1e-6, rtol=0)
    assert not found[4:8].any(), "a sample without keys gets zeros"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_type_and_any_scale(dtype: torch.dtype) -> None:
    lengths = [3, 6]
    q, k, v = (drawn(9, 2, 8, seed=s, dtype=torch.float64) for s in range(3))
    packing = packing_of_lengths(torch.tensor(lengths), 6)
    found = ragged_attention(q.to(dtype), k.to(dtype), v.to(dtype), packing, scale=0.7)
    assert found.dtype == dtype
    expected = one_by_one(q * 0.7 * 8**0.5, k, v, lengths, lengths)
    assert (found.double() - expected).abs().max() <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)


def test_padded_packed_and_one_by_one_agree_over_two_layers() -> None:
    lengths = [16, 9, 11, 2, 16, 1]
    x, weights = drawn(6, 16, WIDTH), layers()
    packing = packing_of_lengths(torch.tensor(lengths), 16)
    there = torch.arange(16) < torch.tensor(lengths)[:, None]
    single = torch.cat([encoded(row[None, :n], weights, dense)[0] for row, n in zip(x, lengths, strict=True)])
    packed = encoded(pack(x, packing), weights, lambda q, k, v: ragged_attention(q, k, v, packing))
    padded = encoded(x, weights, lambda q, k, v: dense(q, k, v, there[:, None, None]))
    assert (packed - single).abs().max() <= 1e-5
    assert (padded[there] - single).abs().max() <= 1e-5

    leaking = encoded(x, weights, dense)
    assert (leaking[there] - single).abs().max() > 0.1, "without the key mask padding must be seen"
    means = torch.stack([part.mean(0) for part in single.split(lengths)])
    assert (segment_mean(packed, packing) - means).abs().max() <= 1e-5
    assert (padded.mean(1) - means).abs().max() > 0.1, "padding must be seen in a plain mean"


def test_a_sample_does_not_depend_on_the_others() -> None:
    lengths, weights = [7, 12, 4], layers(3)
    x = drawn(3, 12, WIDTH, seed=5)

    def run(rows: list[int]) -> list[Tensor]:
        packing = packing_of_lengths(torch.tensor([lengths[r] for r in rows]), 12)
        found = encoded(pack(x[rows], packing), weights, lambda q, k, v: ragged_attention(q, k, v, packing))
        return list(found.split(packing.host_lengths))

    together = run([0, 1, 2])
    for row in range(3):
        assert (run([row])[0] - together[row]).abs().max() <= 1e-5
    transposed = encoded(x.transpose(0, 1), weights, dense).transpose(0, 1)
    swapped = encoded(torch.cat([x[:1], drawn(2, 12, WIDTH, seed=9)]).transpose(0, 1), weights, dense).transpose(0, 1)
    assert (transposed[0] - swapped[0]).abs().max() > 0.1, "attention over the wrong axis must be seen"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_gradients_are_those_of_each_sample_by_itself(way: Attend) -> None:
    lengths = [3, 5, 5, 1, 0]
    packing = packing_of_lengths(torch.tensor(lengths), 6)
    q, k, v = parts = [drawn(14, 2, 4, seed=s, dtype=torch.float64).requires_grad_() for s in range(3)]
    weight = drawn(14, 2, 4, seed=8, dtype=torch.float64)
    found = torch.autograd.grad((way(q, k, v, packing, packing) * weight).sum(), parts)
    expected = torch.autograd.grad((one_by_one(q, k, v, lengths, lengths) * weight).sum(), parts)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)

    x = drawn(5, 6, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda t: segment_mean(pack(t, packing), packing), (x,))
    torch.autograd.gradcheck(lambda t: unpack(pack(t, packing), packing), (x,))


def test_the_mean_of_nothing_is_zero() -> None:
    packing = packing_of_lengths(torch.tensor([2, 0, 1]), 2)
    means = segment_mean(torch.tensor([[1.0], [3.0], [5.0]]), packing)
    assert means.tolist() == [[2.0], [0.0], [5.0]]


def test_what_does_not_fit_is_refused() -> None:
    packing = packing_of_lengths(torch.tensor([2, 3]), 4)
    x = drawn(5, 2, 4)
    with pytest.raises(ValueError, match=r"x has 4 rows; it must have 5"):
        unpack(x[:4], packing)
    with pytest.raises(ValueError, match=r"must begin with \(2, 4\)"):
        pack(drawn(2, 3, 1), packing)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        packing_of(torch.ones(3))
    with pytest.raises(ValueError, match="3 key heads must divide the 2 query heads"):
        ragged_attention(x, drawn(5, 3, 4), drawn(5, 3, 4), packing)
    with pytest.raises(ValueError, match="the packings have 5 queries of 2 samples"):
        ragged_attention(x, x, x, packing, packing_of_lengths(torch.tensor([2, 2]), 4))
    with pytest.raises(ValueError, match="of torch.int64; they must be"):
        Packing(packing.index, packing.cu_seqlens.long(), 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_is_never_waited_for(dtype: torch.dtype) -> None:
    lengths = [7, 12, 4, 0]
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).cuda()
    x, keep = drawn(4, 12, WIDTH).cuda().to(dtype), (torch.arange(23) % 3 > 0).cuda()
    weights = [{name: w.cuda().to(dtype) for name, w in layer.items()} for layer in layers()]

    def run() -> Tensor:
        packing = packing_of(mask, total=23)
        packed = encoded(pack(x, packing), weights, lambda q, k, v: ragged_attention(q, k, v, packing))
        packed, packing = kept(packed, packing, keep, total=15)
        packed = encoded(packed, weights, lambda q, k, v: ragged_attention(q, k, v, packing))
        return segment_mean(packed, packing) + unpack(packed, packing).sum(dim=1)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x, mask, keep = x.cpu().float(), mask.cpu(), keep.cpu()
    weights = [{name: w.cpu().float() for name, w in layer.items()} for layer in weights]
    tolerance = 1e-3 if dtype == torch.float32 else 1.0
    torch.testing.assert_close(found.cpu().float(), run(), atol=tolerance, rtol=0)
