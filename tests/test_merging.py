"""Merging tokens: the maths against slow loops, and networks that merge against networks written out."""

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from models.base import Batch, PrunableModel
from models.merging import Matching, Reduction, counts, match, merge, mergeable
from models.toy_encoder import toy_encoder
from models.vit import ViT
from prune.base import Plan
from prune.surgery import cut
from tests.adapters import ADAPTERS, CLASSES, batch, timm_vit
from tests.modules import stirred
from tests.test_contract import logits, random_plan
from utils.errors import InputError, RunError
from utils.hooks import captured, hooked

TOLERANCE = 1e-5
Maker = Callable[[], tuple[PrunableModel, Batch]]


def patches(name: str = "deit_tiny_patch16_224", **settings: object) -> tuple[PrunableModel, Batch]:
    return timm_vit(name, patch_size=4, depth=3, **settings)


def toy() -> tuple[PrunableModel, Batch]:
    model = toy_encoder(classes=CLASSES, image_size=8, width=24, depth=3, heads=4, neurons=20)
    stirred(model.network)
    return model, batch(1, 8, 8)


def gated() -> tuple[PrunableModel, Batch]:
    model, samples = patches()
    for block in model.network.blocks:  # type: ignore[union-attr]
        block.attn.gate = nn.Linear(24, 24)
    return model, samples


def unfused() -> tuple[PrunableModel, Batch]:
    model, samples = patches()
    for block in model.network.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
    return model, samples


MODELS: dict[str, Maker] = {
    "toy": toy,
    "deit": patches,
    "distilled": lambda: patches("deit_tiny_distilled_patch16_224"),
    "averaged": lambda: patches("vit_base_patch16_224", qk_norm=True, class_token=False, global_pool="avg"),
    "registers": lambda: patches("vit_base_patch16_224", reg_tokens=2, global_pool="avg"),
    "post_norm": lambda: patches("vit_base_patch16_rpn_224", class_token=True, global_pool="token"),
    "layer_scale": lambda: patches("vit_giant_patch14_dinov2", mlp_ratio=2.0, init_values=0.7),
    "gated": gated,
    "unfused": unfused,
}
SCHEDULES = {
    "mlp": Reduction((3, 0, 4)),
    "plain": Reduction((3, 2, 1), proportional=False),
    "attention": Reduction((0, 5, 2), "attention"),
    "capped": Reduction((99, 99, 99)),
    "tokens": Reduction((3, 0, 4), metric="tokens", growth=0.5),
    "weighed": Reduction((3, 2, 4), importance=0.4, growth=0.3),
    "weighed_before": Reduction((0, 3, 4), "attention", metric="tokens", importance=0.4),
    "front_only": Reduction((3, 2, 0), growth=0.3, front_only=True),
    "front_before": Reduction((0, 3, 4), "attention", importance=0.4, front_only=True),
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def made(request: pytest.FixtureRequest) -> tuple[PrunableModel, Batch]:
    return request.param()


def why_unfit(model: PrunableModel, reduction: Reduction) -> str | None:
    """What a model is refused with, if a schedule is not for its kind."""
    if reduction.importance and not model.class_token:
        return "importance=0.4: must be 0 for a model without a class token"
    if reduction.front_only and getattr(model.network, "global_pool", "token") != "token":
        return "front_only=True: must be false for a model whose head reads more than the tokens in front"
    return None


def merging(model: PrunableModel, reduction: Reduction) -> PrunableModel:
    twin = model.copy()
    twin.reduce_tokens(reduction)
    return twin


def slow_merge(
    metric: Tensor, x: Tensor, size: list[float], r: int, front: int, against: Callable[[int, int], float] | None = None
) -> tuple[Tensor, list[float]]:
    """One sample, one token at a time."""
    even = [i for i in range(len(x)) if i % 2 == 0 and i >= front]
    odd = [i for i in range(len(x)) if i % 2 == 1 and i >= front]
    offers = []
    for i in even:
        alike = [float(cosine_similarity(metric[i], metric[j], dim=0)) - (against(i, j) if against else 0) for j in odd]
        best = max(range(len(odd)), key=lambda k: alike[k])  # the first of equals
        offers.append((-alike[best], i, odd[best]))
    members: dict[int, list[int]] = {i: [i] for i in range(len(x))}
    for _, i, j in sorted(offers)[:r]:
        members[j] += members.pop(i)
    order = [*range(front), *(i for i in even if i in members), *odd]
    sizes = [sum(size[i] for i in members[token]) for token in order]
    means = [sum(size[i] * x[i] for i in members[t]) / s for t, s in zip(order, sizes, strict=True)]
    return torch.stack(means), sizes  # type: ignore[arg-type]


@pytest.mark.parametrize("front", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [6, 9, 16])
def test_merging_is_what_the_loop_does(front: int, tokens: int) -> None:
    drawn = torch.Generator().manual_seed(front + tokens)
    metric, x = (torch.randn(4, tokens, d, generator=drawn, dtype=torch.float64) for d in (5, 7))
    size = torch.randint(1, 5, (4, tokens, 1), generator=drawn).double()
    for r in range(mergeable(tokens, front) + 1):
        found, sizes = merge(x, size, match(metric, r, front))
        assert found.shape == (4, tokens - r, 7) and torch.equal(found[:, :front], x[:, :front])
        assert torch.equal(sizes.sum(1), size.sum(1)), "no token is lost, none counted twice"
        for sample in range(4):
            expected, members = slow_merge(metric[sample], x[sample], size[sample].flatten().tolist(), r, front)
            torch.testing.assert_close(found[sample], expected, atol=1e-12, rtol=0)
            assert sizes[sample].flatten().tolist() == members
        total = (found * sizes).sum(1)
        torch.testing.assert_close(total, (x * size).sum(1), atol=1e-10, rtol=0)


def test_equal_similarities_go_by_position() -> None:
    found = match(torch.ones(2, 9, 3), 2, 1)  # even ones behind the first: 2, 4, 6, 8; odd: 1, 3, 5, 7
    assert found.gone.tolist() == [[0, 1]] * 2 and found.target.tolist() == [[0, 0]] * 2
    assert found.kept.tolist() == [[2, 3]] * 2


def test_several_into_one_is_their_mean_in_float32() -> None:
    x = torch.tensor([[[9.0], [1.0], [256.0], [0.0], [1.0]]]).bfloat16()
    matching = Matching(torch.empty(1, 0, dtype=torch.int64), torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), 1)
    found, size = merge(x, torch.ones(1, 5, 1), matching)
    assert found.dtype == torch.bfloat16 and size.flatten().tolist() == [1, 3, 1]
    assert float(found[0, 1]) == float(torch.tensor(258 / 3).bfloat16()), "bfloat16 sums would lose the ones"


@pytest.mark.parametrize("r", [-1, 5])
def test_more_pairs_than_there_are_is_an_error(r: int) -> None:
    with pytest.raises(ValueError, match=rf"r={r}: must be in \[0, 4\] for 9 tokens, 1 of them protected"):
        match(torch.ones(1, 9, 2), r, 1)


def test_counts_follow_place_and_cap() -> None:
    assert counts(Reduction((4, 4, 4)), 9, 1) == [(9, 5), (5, 3), (3, 2)]
    assert counts(Reduction((0, 4, 4), "attention"), 9, 1) == [(9, 9), (5, 5), (3, 3)]
    assert counts(Reduction((5, 5)), 2, 2) == [(2, 2), (2, 2)]
    assert counts(Reduction((4, 4, 0), front_only=True), 9, 1) == [(9, 5), (5, 3), (3, 1)]
    assert counts(Reduction((0, 4, 4), "attention", front_only=True), 9, 2) == [(9, 9), (6, 6), (4, 2)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"merged": (1, -2)}, "-2 must be a whole number of at least 0"),
        ({"merged": (1, True)}, "True must be a whole number"),
        ({"merged": (1, 2), "before": "attention"}, "the first block must merge 0 tokens"),
        ({"merged": (1,), "before": "head"}, "before='head': must be mlp or attention"),
        ({"merged": (1,), "proportional": 1}, "proportional=1: must be true or false"),
        ({"merged": (1, 0), "front_only": 1}, "front_only=1: must be true or false"),
        ({"merged": (1, 1), "front_only": True}, "with front_only the last block must merge 0 tokens"),
    ],
)
def test_a_bad_schedule_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reduction(**wrong)


def test_a_schedule_survives_json() -> None:
    for reduction in SCHEDULES.values():
        assert Reduction.from_json(reduction.to_json()) == reduction
    for damaged in (None, [], {"merged": [1]}, {"merged": 3, "before": "mlp", "proportional": True}):
        with pytest.raises(InputError):
            Reduction.from_json(damaged)


def softmax_attention(attention: nn.Module, x: Tensor, size: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of one sample written out, each key `size` times; the mean keys (T, dh), and the first row's mean."""
    if hasattr(attention, "qkv"):
        qkv = nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias)  # type: ignore[union-attr,arg-type]
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)  # type: ignore[operator,union-attr]
        q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator]
        out, gate = attention.proj, attention.gate
    else:
        parts = (attention.query, attention.key, attention.value)
        q, k, v = (part(x).unflatten(-1, (attention.heads, -1)) for part in parts)  # type: ignore[operator]
        out, gate = attention.out, None
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * size
    weights = weights / weights.sum(-1, keepdim=True)
    mixed = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
    mixed = mixed if gate is None else mixed * gate(x).sigmoid()  # type: ignore[operator]
    return out(mixed), (k.mean(1), weights[:, 0].mean(0))  # type: ignore[operator]


Looked = tuple[Tensor, Tensor]


def slow_step(x: Tensor, size: list[float], looked: Looked, r: int, how: Reduction, front: int):
    """Merge the tokens of one sample by what the attention before showed."""
    keys, row = looked
    shares = [float(a / row.mean()) / s for a, s in zip(row, size, strict=True)]

    def against(i: int, j: int) -> float:
        return how.growth * log(size[i] + size[j]) + how.importance * (shares[i] + shares[j])

    return slow_merge(keys if how.metric == "keys" else x, x, size, r, front, against)


def slow_block(block: nn.Module, x: Tensor, size: list[float], looked: Looked | None, r: int, model: PrunableModel):
    """One block on one sample, every step written out; gives tokens, sizes, and what the next merge looks at."""
    how, front = model.reduction, model.protected_tokens
    assert isinstance(how, Reduction)
    r = min(r, (len(x) - front) // 2)
    if how.before == "attention" and r:
        assert looked is not None
        x, size = slow_step(x, size, looked, r, how, front)
    weights = torch.tensor(size, dtype=x.dtype) if how.proportional else torch.ones(len(x), dtype=x.dtype)
    toy, post = hasattr(block, "attention"), not hasattr(block, "ls1") and not hasattr(block, "attention")
    attention = block.attention if toy else block.attn
    added, looked = softmax_attention(attention, x if post else block.norm1(x), weights)  # type: ignore[operator,arg-type]
    x = x + (added if toy else block.norm1(added) if post else block.ls1(added))  # type: ignore[operator]
    if how.before == "mlp" and r:
        x, size = slow_step(x, size, looked, r, how, front)
    if toy:
        return x + block.fc2(nn.functional.gelu(block.fc1(block.norm2(x)))), size, looked  # type: ignore[operator]
    x = x + (block.norm2(block.mlp(x)) if post else block.ls2(block.mlp(block.norm2(x))))  # type: ignore[operator]
    return x, size, looked


def slow_logits(model: PrunableModel, samples: Batch) -> Tensor:
    """A network that merges tokens, sample by sample and step by step."""
    network, found = model.network, []
    for image in samples["inputs"]:
        if isinstance(model, ViT):
            x = model.network.norm_pre(model.network._pos_embed(model.network.patch_embed(image[None])))[0]
        else:
            x = torch.cat([network.cls, network.embed(image[None])], 1)[0] + network.position[0]  # type: ignore
        size, looked = [1.0] * len(x), None
        for block, r in zip(network.blocks, model.reduction.merged, strict=True):  # type: ignore
            x, size, looked = slow_block(block, x, size, looked, r, model)
        found.append(slow_head(model, network.norm(x), size))  # type: ignore[operator]
    return torch.stack(found)


def slow_head(model: PrunableModel, x: Tensor, size: list[float]) -> Tensor:
    network, front = model.network, model.protected_tokens
    if getattr(network, "global_pool", "token") == "avg":
        x = sum(s * row for s, row in zip(size[front:], x[front:], strict=True)) / sum(size[front:])  # type: ignore
        return network.head(network.fc_norm(x))  # type: ignore[operator]
    if hasattr(network, "head_dist"):
        return (network.head(x[0]) + network.head_dist(x[1])) / 2  # type: ignore[operator]
    return network.head(x[0])  # type: ignore[operator]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@torch.inference_mode()
def test_a_network_that_merges_is_the_one_written_out(made: tuple[PrunableModel, Batch], schedule: Reduction) -> None:
    model, samples = made
    if why := why_unfit(model, schedule):
        with pytest.raises(InputError, match=why):
            merging(model, schedule)
        return
    model.network.double()
    samples = {"inputs": samples["inputs"].double()}
    dense, small = logits(model, samples), merging(model, schedule)
    found = logits(small, samples)
    torch.testing.assert_close(found, slow_logits(small, samples), atol=1e-9, rtol=0)
    assert (found - dense).abs().max() > 1e-4, "merging must bite, or the test shows nothing"
    assert torch.equal(logits(model, samples), dense), "the model itself stays as it was"
    assert torch.equal(logits(small, samples), found), "nothing of a pass stays for the next"


@torch.inference_mode()
def test_asking_for_the_tokens_in_front_alone_changes_no_answer(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    how = Reduction((3, 2, 0), front_only=True)
    if why := why_unfit(model, how):
        with pytest.raises(InputError, match=why):
            merging(model, how)
        return
    for merged, before in (((0, 0, 0), "mlp"), ((3, 2, 0), "mlp"), ((0, 2, 3), "attention")):
        whole = merging(model, Reduction(merged, before))  # type: ignore[arg-type]
        front = merging(model, Reduction(merged, before, front_only=True))  # type: ignore[arg-type]
        torch.testing.assert_close(logits(front, samples), logits(whole, samples), atol=TOLERANCE, rtol=0)
        last = front.blocks()[-1]
        with captured(front.network, [last]) as seen:
            logits(front, samples)
        assert seen[last].shape[1] == front.protected_tokens, "no other token is computed"
        front.reduce_tokens(Reduction(merged, before))  # type: ignore[arg-type]
        assert torch.equal(logits(front, samples), logits(whole, samples)), "another schedule takes it back"


@torch.inference_mode()
def test_importance_and_growth_choose_other_pairs(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    plain = logits(merging(model, Reduction((3, 3, 3))), samples)
    found = [logits(merging(model, Reduction((3, 3, 3), growth=2.0)), samples)]
    found += [logits(merging(model, Reduction((3, 3, 3), metric="tokens")), samples)]
    if model.class_token:
        found.append(logits(merging(model, Reduction((3, 3, 3), importance=2.0)), samples))
    assert all((other - plain).abs().max() > 1e-5 for other in found)


def test_sizes_matter_to_attention_and_to_the_average(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    counted, plain = (logits(merging(model, Reduction((4, 4, 0), proportional=p)), samples) for p in (True, False))
    assert (counted - plain).abs().max() > 1e-4
    small = merging(model, Reduction((4, 4, 0)))
    if getattr(model.network, "global_pool", "token") == "avg":
        expected = logits(small, samples)
        small.network.flow.mean = lambda x, front: x[:, front:].mean(1)  # type: ignore[union-attr,assignment]
        assert (logits(small, samples) - expected).abs().max() > 1e-4


def test_nothing_merged_is_bit_equal_to_dense(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    for before in ("mlp", "attention"):
        assert torch.equal(logits(merging(model, Reduction((0, 0, 0), before)), samples), logits(model, samples))


def test_names_units_and_feature_points_stay(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    small = merging(model, Reduction((3, 2, 1)))
    small.reduce_tokens(Reduction((1, 1, 1)))  # replaces the schedule
    dense, left = model.network.state_dict(), small.network.state_dict()
    assert list(dense) == list(left) and all(torch.equal(dense[name], left[name]) for name in dense)
    assert [g.name for g in small.unit_groups()] == [g.name for g in model.unit_groups()]
    names = [*small.feature_points(), *(g.consumer.module for g in small.unit_groups())]
    with captured(small.network, names) as seen:
        logits(small, samples)
    assert seen.keys() == set(names), "every hook fires"
    tokens = [seen[f"{block}.norm1"].shape[1] for block in small.blocks()]
    assert tokens == [tokens[0], tokens[0] - 1, tokens[0] - 2]


def test_a_sample_does_not_see_the_others(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    small = merging(model, Reduction((3, 3, 3)))
    alone = torch.cat([logits(small, {"inputs": one[None]}) for one in samples["inputs"]])
    torch.testing.assert_close(logits(small, samples), alone, atol=TOLERANCE, rtol=0)


def test_cutting_and_merging_go_together(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    units, schedule = random_plan(model, 0), SCHEDULES["attention"]
    rows = tuple(counts(schedule, 99, 1))
    plan = Plan.of(model, units.kept, tokens=schedule, token_counts=rows)
    both = cut(model, plan)
    both.network.requires_grad_(False)
    torch.testing.assert_close(logits(both, samples), slow_logits(both, samples), atol=TOLERANCE, rtol=0)
    assert torch.equal(logits(cut(merging(model, schedule), units), samples), logits(both, samples))
    assert (logits(both, samples) - logits(cut(model, units), samples)).abs().max() > 100 * TOLERANCE


def test_an_attention_without_heads_is_matched_by_its_tokens(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    none = torch.tensor([], dtype=torch.int64)
    bare = cut(model, Plan.of(model, {"blocks.1.heads": none}))
    for schedule in (Reduction((2, 3, 1)), Reduction((0, 2, 3), "attention")):
        found = logits(merging(bare, schedule), samples)
        assert found.isfinite().all() and found.shape == logits(model, samples).shape


def test_copies_share_nothing(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    small = merging(model, Reduction((3, 2, 1)))
    small.logits(samples).sum().backward()
    expected, twin = logits(small, samples), small.copy()
    flows = [block.flow for block in twin.network.blocks]  # type: ignore[union-attr]
    assert len(set(map(id, flows))) == 1 and flows[0] is not small.network.blocks[0].flow  # type: ignore[index,union-attr]
    twin.reduce_tokens(Reduction((0, 0, 0)))
    assert torch.equal(logits(twin, samples), logits(model, samples))
    assert torch.equal(logits(small, samples), expected) and small.reduction == Reduction((3, 2, 1))


def test_a_pass_that_breaks_off_leaves_nothing(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    small = merging(model, Reduction((0, 3, 1), "attention"))
    expected = logits(small, samples)

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hooked(after=[(small.network.get_submodule("blocks.1.norm2"), stop)]):
        logits(small, samples)
    flow = small.copy().network.blocks[0].flow  # type: ignore[index,union-attr]
    assert flow.size is None, "a copy starts anew"
    assert torch.equal(logits(small, samples), expected)


def test_gradients_reach_every_weight(made: tuple[PrunableModel, Batch]) -> None:
    model, samples = made
    small = merging(model, Reduction((3, 2, 1)))
    small.network.train()
    small.logits(samples).square().sum().backward()
    without = [name for name, p in small.network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_run(made: tuple[PrunableModel, Batch], dtype: torch.dtype) -> None:
    model, samples = made
    small = merging(model, Reduction((4, 3, 2)))
    small.network.to(dtype)
    found = logits(small, small.place({"inputs": samples["inputs"]}))
    assert found.dtype == dtype and found.isfinite().all()


def test_one_patch_is_never_merged() -> None:
    model, samples = timm_vit("deit_tiny_patch16_224", patch_size=16)
    assert torch.equal(logits(merging(model, Reduction((5, 5))), samples), logits(model, samples))


def test_the_fingerprint_tells_a_merging_model_from_a_dense_one() -> None:
    model, _ = toy()
    prints = {m.fingerprint() for m in (model, *(merging(model, s) for s in SCHEDULES.values()))}
    assert len(prints) == 1 + len(SCHEDULES)


@pytest.mark.parametrize(
    ("make", "reduction", "message"),
    [
        (ADAPTERS["bert"], Reduction((1, 1)), "it has no tokens that can be merged"),
        (ADAPTERS["conv"], Reduction((1, 1)), "it has no tokens that can be merged"),
        (toy, Reduction((1, 1)), "has 2 entries for 3 blocks"),
        (lambda: patches("vit_base_patch16_224", global_pool="map"), Reduction((1, 1, 1)), "global_pool=map"),
        (lambda: patches("vit_base_patch16_224", global_pool="max"), Reduction((1, 1, 1)), "global_pool=max"),
    ],
)
def test_what_cannot_merge_says_so(make: Maker, reduction: Reduction, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()[0].reduce_tokens(reduction)


def test_blocks_that_are_replayed_are_noticed() -> None:
    model, samples = toy()
    small = merging(model, Reduction((1, 1, 1)))
    logits(small, samples)
    with pytest.raises(RunError, match="block 1 ran after block 2"):
        small.network.blocks[1](torch.zeros(1, 5, 24))  # type: ignore[index,operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_a_pass_on_a_gpu_never_waits_for_the_host(made: tuple[PrunableModel, Batch], tmp_path: Path) -> None:
    model, samples = made
    small = merging(model, Reduction((3, 2, 1)))
    expected = logits(small, samples)
    small.network.cuda()
    placed = small.place({"inputs": samples["inputs"]})
    logits(small, placed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = logits(small, placed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)
