"""Networks that drop tokens against networks written out sample by sample, and what every one of them owes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from evals.macs import counted_macs, scoring_macs
from models import keeping_flow
from models.base import Batch, PrunableModel
from models.checkpoint import load_weights, save_model
from models.cost import cost_model
from models.keeping import Keeping, Signals
from models.keeping_flow import flow_of, watched_tokens
from models.toy_encoder import toy_encoder
from prune.tokens.ats import Sampled
from prune.tokens.attention_threshold import MostReceived, ReceivedAbove
from prune.tokens.evit import ClassAttention
from prune.tokens.random_k import RandomTokens
from prune.tokens.rules import BestShare
from prune.tokens.threshold_l2 import LargestNorms, NormAbove, ValueNormAbove
from prune.tokens.value_attention import ValueAttention
from tests.adapters import CLASSES, batch, encoder, timm_vit
from tests.modules import stirred
from utils.errors import InputError, RunError

TOLERANCE = 1e-5
Maker = Callable[[], tuple[PrunableModel, Batch]]


def toy(depth: int = 3) -> tuple[PrunableModel, Batch]:
    model = toy_encoder(classes=CLASSES, image_size=8, width=24, depth=depth, heads=4, neurons=20)
    stirred(model.network)
    return model, batch(1, 8, 8)


def patches(name: str = "deit_tiny_patch16_224", **settings: object) -> tuple[PrunableModel, Batch]:
    return timm_vit(name, patch_size=4, depth=3, **settings)


VISION: dict[str, Maker] = {
    "toy": toy,
    "deit": patches,
    "distilled": lambda: patches("deit_tiny_distilled_patch16_224"),
    "post_norm": lambda: patches("vit_base_patch16_rpn_224", class_token=True, global_pool="token"),
    "registers": lambda: patches("vit_base_patch16_224", reg_tokens=2, global_pool="avg"),
}
TEXT: dict[str, Maker] = {
    kind: lambda kind=kind: encoder(kind) for kind in ("bert", "distilbert", "roberta-prelayernorm", "megatron-bert")
}
MODELS = VISION | TEXT
MEDIAN = "median"  # stands for thresholds that split the tokens of each model
RULES: dict[str, Callable[[tuple[float, ...]], Any]] = {
    "norm": lambda at: NormAbove(at),
    "value_norm": lambda at: ValueNormAbove(at),
    "received": lambda at: ReceivedAbove(at),
    "best_norm": lambda _: LargestNorms((0.6, 0.7)),
    "most_received": lambda _: MostReceived((0.6, 0.7)),
    "evit": lambda _: ClassAttention((0.6, 0.7)),
    "ats": lambda _: Sampled((0.6, 0.7)),
    "value_attention": lambda _: ValueAttention((0.6, 0.7)),
    "random": lambda _: RandomTokens((0.6, 0.7), seed=3),
}


def logits(model: PrunableModel, samples: Batch) -> Tensor:
    with torch.inference_mode():
        return model.logits(samples)


def dropping(model: PrunableModel, keeping: Keeping) -> PrunableModel:
    twin = model.copy()
    twin.reduce_tokens(keeping)
    return twin


def keeping_of(name: str, model: PrunableModel, samples: Batch, batching: str = "pad", fuse: str = "none") -> Keeping:
    """A rule at two blocks, thresholds at the median of the scores that arrive there."""
    blocks = len(model.blocks())
    layers = (0, blocks - 1) if blocks > 1 else (0,)
    before = "attention" if name in ("norm", "best_norm", "random") else "mlp"

    def made(thresholds: tuple[float, ...]) -> Keeping:
        return Keeping(RULES[name](thresholds), layers, blocks, before, batching, fuse)  # type: ignore[arg-type]

    if name not in ("norm", "value_norm", "received"):
        return made(())
    found: list[Tensor] = []
    twin = dropping(model, made((-math.inf, -math.inf)))
    with watched_tokens(flow_of(twin), lambda _, scores, eligible: found.append(scores[eligible])):
        logits(twin, samples)
    # between two scores, so that rounding decides nothing
    middles = [float(s.sort().values[len(s) // 2 - 1 : len(s) // 2 + 1].mean()) for s in found]
    return made(tuple(middles))


def each_alone(model: PrunableModel, samples: Batch) -> Tensor:
    """Every sample by itself, without any padding."""
    rows = []
    for row in range(len(next(iter(samples.values())))):
        one = {name: tensor[row : row + 1] for name, tensor in samples.items()}
        if "attention_mask" in one:
            length = int(one["attention_mask"].sum())
            one = {name: t[:, :length] if t.ndim == 2 else t for name, t in one.items()}
        rows.append(logits(model, one))
    return torch.cat(rows)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("made", MODELS)
def test_pad_pack_and_mask_are_what_each_sample_gives_alone(made: str, rule: str) -> None:
    model, samples = MODELS[made]()
    dense = logits(model, samples)
    for fuse in ("none", "sum") if rule in ("evit", "most_received", "received") else ("none",):
        first = None
        for batching in ("pad", "pack", "mask"):
            twin = dropping(model, keeping_of(rule, model, samples, batching, fuse))
            found = logits(twin, samples)
            assert (found - each_alone(twin, samples)).abs().max() <= TOLERANCE
            first = found if first is None else first
            assert (found - first).abs().max() <= TOLERANCE
        assert first is not None and (first - dense).abs().max() > 10 * TOLERANCE, "nothing went"


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("batching", ["pad", "pack", "mask"])
def test_keeping_everything_is_the_dense_network_to_the_bit(made: str, batching: str) -> None:
    model, samples = MODELS[made]()
    blocks = len(model.blocks())
    rules = [ClassAttention((1.0,) * blocks), NormAbove((-math.inf,) * blocks), ReceivedAbove((-math.inf,) * blocks),
             Sampled((1.0,) * blocks), RandomTokens((1.0,) * blocks)]  # fmt: skip
    example = {name: tensor[:1] for name, tensor in samples.items()}
    for rule in rules:
        twin = dropping(model, Keeping(rule, tuple(range(blocks)), blocks, "mlp", batching, "sum"))  # type: ignore[arg-type]
        assert torch.equal(logits(twin, samples), logits(model, samples)) and not twin.reduction.merges  # type: ignore[union-attr]
        assert cost_model(twin, example).total("macs") == cost_model(model, example).total("macs")
        assert counted_macs(twin, example) == counted_macs(model, example)


def test_a_low_but_finite_threshold_is_dense_to_the_bit_too() -> None:
    model, samples = toy()
    for batching in ("pad", "pack"):
        twin = dropping(model, Keeping(NormAbove((0.0,)), (1,), 3, "attention", batching))  # type: ignore[arg-type]
        assert torch.equal(logits(twin, samples), logits(model, samples))


def slow_toy(model: PrunableModel, image: Tensor, keep: Mapping[int, Callable[[Tensor, Tensor, Tensor], list[int]]],
             before: str, fuse: bool) -> Tensor:  # fmt: skip
    """The toy encoder on one sample, one block after the other, dropping by lists of positions."""
    net: Any = model.network
    x = net.embed(image[None])[0]
    x = torch.cat([net.cls[0], x]) + net.position[0]
    for layer, block in enumerate(net.blocks):
        if before == "attention" and layer in keep:
            x = x[keep[layer](x, x, x)]
        y = block.norm1(x)
        heads = block.attention.heads
        q, k, v = (
            p(y).view(len(y), heads, -1) for p in (block.attention.query, block.attention.key, block.attention.value)
        )
        maps = [((q[:, h] @ k[:, h].T) * block.attention.scale).softmax(-1) for h in range(heads)]
        x = x + block.attention.out(torch.cat([maps[h] @ v[:, h] for h in range(heads)], dim=-1))
        if before == "mlp" and layer in keep:
            row = torch.stack(maps)[:, 0].mean(0)
            stay = keep[layer](x, row, torch.stack(maps).mean(0).mean(0))
            gone = [j for j in range(len(x)) if j not in stay]
            extra: list[Any] = [sum(row[j] * x[j] for j in gone)] if fuse and gone else []
            x = torch.stack([*(x[j] for j in stay), *extra])
        x = x + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(x))))
    return net.head(net.norm(x)[0])


def best(scores: Tensor, k: int) -> list[int]:
    others = sorted(range(1, len(scores)), key=lambda j: (-float(scores[j]), j))
    return sorted([0, *others[:k]])


def test_evit_is_what_a_loop_over_samples_gives() -> None:
    model, samples = toy()
    share = {0: 0.6, 2: 0.7}
    for fuse in (True, False):
        keep = {
            layer: lambda x, row, _, s=s: best(row, math.ceil(s * (len(x) - 1) - 1e-9)) for layer, s in share.items()
        }
        how = "sum" if fuse else "none"
        twin = dropping(model, Keeping(ClassAttention((0.6, 0.7)), (0, 2), 3, "mlp", "pad", how))
        with torch.inference_mode():
            expected = torch.stack([slow_toy(model, image, keep, "mlp", fuse) for image in samples["inputs"]])
        torch.testing.assert_close(logits(twin, samples), expected, atol=TOLERANCE, rtol=0)


def test_received_attention_and_norms_are_what_a_loop_gives() -> None:
    model, samples = toy()
    for name, before, score in (("received", "mlp", 2), ("norm", "attention", 0)):
        keeping = keeping_of(name, model, samples, "pack")
        at = dict(zip(keeping.layers, keeping.rule.thresholds, strict=True))  # type: ignore[attr-defined]

        def stay(x: Tensor, row: Tensor, got: Tensor, layer: int, score: int = score, at: Any = at) -> list[int]:
            values = x.norm(dim=-1) if score == 0 else got
            over = [j for j in range(1, len(x)) if float(values[j]) > at[layer]]
            return [0, *(over or best(values, 1)[1:])]

        keep = {layer: lambda x, row, got, layer=layer, stay=stay: stay(x, row, got, layer) for layer in at}
        with torch.inference_mode():
            expected = torch.stack([slow_toy(model, image, keep, before, False) for image in samples["inputs"]])
        found = logits(dropping(model, keeping), samples)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_without_the_key_mask_padding_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = toy()
    twin = dropping(model, keeping_of("norm", model, samples))
    expected = logits(twin, samples)
    monkeypatch.setattr(keeping_flow, "key_bias", lambda valid, dtype: None)
    assert (logits(twin, samples) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_does_not_depend_on_its_batch(rule: str) -> None:
    model, samples = toy()
    more = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    twin = dropping(model, keeping_of(rule, model, samples))
    together = logits(twin, {"inputs": more})
    alone = torch.cat([logits(twin, {"inputs": row[None]}) for row in more])
    assert (together - alone).abs().max() <= TOLERANCE
    other = more.clone()
    other[1:] = other[1:].flip(0) * 3
    assert (logits(twin, {"inputs": other})[0] - together[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("made", MODELS)
def test_special_tokens_and_the_floor_always_stay(made: str) -> None:
    model, samples = MODELS[made]()
    front = 1 if made in TEXT else model.protected_tokens
    blocks = len(model.blocks())
    keeping = Keeping(NormAbove((math.inf,) * blocks, min_k=3), tuple(range(blocks)), blocks, "attention")
    if made in TEXT:
        keeping = replace(keeping, special=(int(samples["input_ids"][0, 4]),))
    twin = dropping(model, keeping)
    with watched_tokens(flow_of(twin)) as flow:
        logits(twin, samples)
        assert flow.seen is not None
        counts, positions = flow.seen.counts, flow.seen.positions[-1]
    entered = samples["attention_mask"].sum(1) if made in TEXT else torch.full((6,), counts.max().item())
    assert (positions[:, :front] == torch.arange(front)).all()
    if made in TEXT:
        special = torch.isin(samples["input_ids"][:, 1:], torch.tensor(keeping.special)).sum(1)
        assert special.any() and (counts[:, -1, 1] == torch.minimum(entered, front + special + 3)).all()
    else:
        assert (counts == front + 3).all()


@dataclass(frozen=True)
class Blind(BestShare):
    """Tells no token from another."""

    value: ClassVar[float] = 1.0
    name: ClassVar[str] = "blind"

    def scores(self, signals: Signals) -> Tensor:
        return torch.full(signals.tokens.shape[:-1], self.value)


class Broken(Blind):
    """Scores that are no numbers."""

    value = math.nan


def test_equal_scores_go_by_position_and_a_broken_one_is_named() -> None:
    model, samples = toy()
    twin = dropping(model, Keeping(Blind((0.25,)), (1,), 3))
    with watched_tokens(flow_of(twin)) as flow:
        logits(twin, samples)
        assert flow.seen is not None
        assert flow.seen.positions[-1].tolist() == [[0, 1, 2, 3, 4]] * 6
    with pytest.raises(RunError, match="prune=blind: block 1: 96 scores of tokens are NaN or infinite"):
        logits(dropping(model, Keeping(Broken((0.25,)), (1,), 3)), samples)
    assert torch.isfinite(logits(twin, samples)).all()


def test_tiny_networks_and_batches() -> None:
    model = toy_encoder(classes=2, tokens=1, token_width=3, width=8, depth=2, heads=2, neurons=4)
    one = {"inputs": torch.randn(1, 1, 3)}
    rules = (ClassAttention((0.3, 0.3)), NormAbove((math.inf,) * 2), Sampled((0.1, 0.5)), ReceivedAbove((9.0, 9.0)))
    for rule in rules:
        for batching in ("pad", "pack", "mask"):
            twin = dropping(model, Keeping(rule, (0, 1), 2, "mlp", batching, "sum"))  # type: ignore[arg-type]
            torch.testing.assert_close(logits(twin, one), logits(model, one))


@pytest.mark.parametrize("rule", RULES)
def test_executed_macs_are_the_closed_form(rule: str) -> None:
    for made in ("deit", "bert"):
        model, samples = MODELS[made]()
        example = {name: tensor[:1] for name, tensor in samples.items()}
        for fuse in ("none", "mean"):
            twin = dropping(model, keeping_of(rule, model, samples, "pad", fuse))
            costs = cost_model(twin, example)
            assert costs.total("macs") + scoring_macs(twin, costs, example) == counted_macs(twin, example)
            if twin.reduction.rule.exact and made == "deit":  # type: ignore[union-attr]
                before = cost_model(model, example).dropping
                assert before is not None and before.of(twin.reduction) == costs.total("macs")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("made", ["toy", "bert"])
def test_saved_and_loaded_is_the_same_to_the_bit(made: str, rule: str, tmp_path: Path) -> None:
    model, samples = MODELS[made]()
    keeping = keeping_of(rule, model, samples, "pack", "sum")
    if isinstance(keeping.rule, ValueNormAbove):
        keeping = replace(keeping, rule=ValueNormAbove((-math.inf, keeping.rule.thresholds[1])))
    twin = dropping(model, keeping)
    loaded = load_weights(MODELS[made]()[0], str(save_model(twin, tmp_path / "m")))
    assert loaded.reduction == keeping and loaded.fingerprint() == twin.fingerprint() != model.fingerprint()
    assert torch.equal(logits(loaded, samples), logits(twin, samples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "os.path.join"}, "from outside this package"),
        ({"rule": "prune.tokens.evit.Nothing"}, "cannot be built"),
        ({"settings": {"keeps": [2.0]}}, r"must be in \(0, 1\]"),
        ({"settings": {"keeps": [0.5, 0.5]}}, "the rule has amounts for 2"),
        ({"layers": [7]}, r"must ascend without repeats in \[0, 3\)"),
        ({"layers": "1"}, "must be whole numbers"),
        ({"blocks": 4}, "the network has 3 blocks"),
        ({"batching": "sometimes"}, "must be one of pad, pack, mask"),
        ({"before": "attention"}, "looks at the attention of the block"),
    ],
)
def test_damaged_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    model, _ = toy()
    found = Keeping(ClassAttention((0.5,)), (1,), 3).to_json()
    with pytest.raises(InputError, match=message):
        model.reduce_tokens(Keeping.from_json({**found, **change}))


def test_blocks_out_of_order_are_refused_and_copies_start_anew() -> None:
    model, samples = toy()
    twin = dropping(model, keeping_of("evit", model, samples))
    expected = logits(twin, samples)
    with pytest.raises(RunError, match="block 1 ran after block -1"):
        twin.copy().network.blocks[1](torch.randn(1, 5, 24))  # type: ignore[operator,index]
    again = dropping(twin, keeping_of("evit", model, samples))
    assert torch.equal(logits(twin.copy(), samples), expected) and torch.equal(logits(again, samples), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["best_norm", "evit", "value_attention", "random", "most_received"])
def test_shares_of_images_never_wait_for_the_gpu(rule: str) -> None:
    model, samples = patches()
    twin = dropping(model, keeping_of(rule, model, samples, "pad", "sum"))
    expected = logits(twin, samples)
    twin.network.cuda()
    placed = twin.place(samples)
    logits(twin, placed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = logits(twin, placed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found.cpu() - expected).abs().max() < 1e-3
