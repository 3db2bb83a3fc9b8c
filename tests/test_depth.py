"""Removing blocks: scores against slow loops, removal against skipping, and everything that has to follow."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from evals.macs import counted_macs
from main import run
from models import load
from models.base import Batch, PrunableModel
from models.bert import bert
from models.checkpoint import how_to_load, load_weights, save_model
from models.cost import cost_model
from models.llama import llama
from models.merging import Reduction
from models.toy_encoder import toy_encoder
from prune.base import BlockPlan, Plan, Scores
from prune.depth.method import Depth, kept_blocks
from prune.depth.scores import angles, cosines, last_tokens
from prune.depth.stream import angular_distances, block_influence
from prune.rankers.fisher import Fisher
from prune.recovery.distill import Distill
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, Adapter, batch, bundle_of, causal, timm_vit
from tests.conftest import Compose
from tests.modules import CLASSES, stirred
from tests.test_contract import logits, random_plan
from utils.errors import InputError, RunError
from utils.hooks import captured, is_hooked
from utils.storage import Store

MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
MOVABLE = {name: make for name, make in ADAPTERS.items() if make()[0].fixed_blocks is None}


def toy(depth: int = 4) -> tuple[PrunableModel, Batch]:
    model = toy_encoder(classes=CLASSES, image_size=8, width=24, depth=depth, heads=4, neurons=20)
    stirred(model.network)
    return model, batch(1, 8, 8)


def sliding() -> tuple[PrunableModel, Batch]:
    return causal("qwen2", num_hidden_layers=4, layer_types=MIXED, use_sliding_window=True, sliding_window=3)


def deep_bert() -> tuple[PrunableModel, Batch]:
    sizes = {"vocab_size": 50, "max_position_embeddings": 24, "hidden_size": 24, "num_hidden_layers": 4}
    model = bert(classes=3, settings={"model_type": "bert", "num_attention_heads": 4, "intermediate_size": 20, **sizes})
    stirred(model.network)
    return model, {**causal("llama")[1], "labels": torch.arange(6) % 3}


DEEP: dict[str, Adapter] = {
    "llama": lambda: causal("llama", num_hidden_layers=4),
    "sliding": sliding,
    "toy": toy,
    "deit": lambda: timm_vit("deit_tiny_patch16_224", depth=4),
    "bert": deep_bert,
}


def without(model: PrunableModel, *removed: int) -> Plan:
    count = len(model.blocks())
    return Plan.of(model, {}, blocks=BlockPlan(tuple(i for i in range(count) if i not in removed), count))


@pytest.fixture(params=DEEP.values(), ids=list(DEEP))
def deep(request: pytest.FixtureRequest) -> tuple[PrunableModel, Batch]:
    return request.param()


@pytest.mark.parametrize("make", MOVABLE.values(), ids=list(MOVABLE))
def test_removed_blocks_are_skipped_blocks(make: Adapter) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, samples = make()
        model.network.to(dtype)
        samples = model.place(samples)
        dense = logits(model, samples)
        for plan in (without(model, 0), without(model, 1)):
            with masked(model, plan):
                expected = logits(model, samples)
            assert (logits(cut(model, plan), samples) - expected).abs().max() <= tolerance
            assert (expected - dense).abs().max() > 1e-3, "the plan must bite"
        assert torch.equal(logits(model, samples), dense) and not is_hooked(model.network)


def test_several_blocks_go_and_costs_are_as_predicted(deep: tuple[PrunableModel, Batch]) -> None:
    model, samples = deep
    example = {name: tensor[:1] for name, tensor in samples.items()}
    costs = cost_model(model, example)
    for removed in [(0,), (3,), (1, 2), (0, 1, 3)]:
        plan = without(model, *removed)
        assert plan.blocks is not None and plan.blocks.removed == removed
        pruned = cut(model, plan)
        with masked(model, plan):
            expected = logits(model, samples)
        assert (logits(pruned, samples) - expected).abs().max() <= 1e-5
        assert costs.total("params", blocks=plan.blocks.kept) == sum(p.numel() for p in pruned.network.parameters())
        assert costs.total("macs", blocks=plan.blocks.kept) == cost_model(pruned, example).total("macs")
        assert cost_model(pruned, example).total("macs") == pytest.approx(counted_macs(pruned, example), rel=0.01)
        assert pruned.block_origin == plan.blocks.kept and len(model.blocks()) == 4
    full = cut(model, without(model))
    assert torch.equal(logits(full, samples), logits(model, samples)) and full.fingerprint() == model.fingerprint()


def test_cutting_again_saving_and_loading(deep: tuple[PrunableModel, Batch], tmp_path: Path) -> None:
    """Blocks, then units, then blocks; the manifest says which of the dense network's are left."""
    model, samples = deep
    once = cut(model, without(model, 1))
    fisher = Fisher(ratio=0.3)
    costs = cost_model(once, {name: tensor[:1] for name, tensor in samples.items()})
    plan = fisher.plan(once, fisher.rank(once, bundle_of(samples)), costs)
    twice = cut(once, plan)
    with masked(once, plan):
        assert (logits(twice, samples) - logits(once, samples)).abs().max() <= 1e-5
    thrice = cut(twice, without(twice, 0))
    assert thrice.block_origin == (2, 3)
    folder = save_model(thrice, tmp_path / "model")
    fresh, _ = type_of(model)
    found = load_weights(fresh, str(folder))
    assert torch.equal(logits(found, samples), logits(thrice, samples)) and found.block_origin == (2, 3)
    assert found.origin.keys() == thrice.origin.keys() == {g.name for g in thrice.unit_groups()}
    assert all(torch.equal(found.origin[name], units) for name, units in thrice.origin.items())
    loaded = load(folder)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in thrice.network.parameters())
    again = cut(found, random_plan(found, 3))
    assert save_model(again, tmp_path / "again") and load(tmp_path / "again") is not None


def type_of(model: PrunableModel) -> tuple[PrunableModel, Batch]:
    """The same dense model once more."""
    return next(made for make in DEEP.values() if type((made := make())[0]) is type(model)
                and made[0].recipe.arguments == model.recipe.arguments)  # fmt: skip


def test_units_and_blocks_in_one_plan(deep: tuple[PrunableModel, Batch], tmp_path: Path) -> None:
    model, samples = deep
    units = random_plan(model, 4)
    plan = Plan(units.groups, blocks=BlockPlan((0, 2, 3), 4))
    with masked(model, plan):
        expected = logits(model, samples)
    pruned = cut(model, plan)
    assert (logits(pruned, samples) - expected).abs().max() <= 1e-5
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and not plan.is_identity
    assert plan.summary()["blocks"] == {"kept": [0, 2, 3], "count": 4}


def test_plans_without_blocks_say_nothing_of_them(tmp_path: Path) -> None:
    model, _ = toy()
    full = without(model)
    full.save(tmp_path / "full.json")
    assert full.is_identity and Plan.load(tmp_path / "full.json") == full and "blocks" in full.summary()
    assert "blocks" not in Plan.of(model, {}).summary() and not without(model, 2).is_identity


@pytest.mark.parametrize("make", [DEEP["llama"], sliding, lambda: causal("mistral", num_hidden_layers=4)])
def test_stock_transformers_loads_it_and_generates_with_and_without_cache(make: Adapter, tmp_path: Path) -> None:
    model, samples = make()
    dense_numbers = [a.layer_idx for a in attentions(model)]
    pruned = cut(model, without(model, 0, 2))
    assert [a.layer_idx for a in attentions(pruned)] == [0, 1]
    assert [a.layer_idx for a in attentions(model)] == dense_numbers == [0, 1, 2, 3]
    config = pruned.network.config
    assert config.num_hidden_layers == 2 and model.network.config.num_hidden_layers == 4  # type: ignore[union-attr]
    if "sliding" in str(getattr(config, "layer_types", None)):
        assert config.layer_types == [MIXED[1], MIXED[3]]  # type: ignore[union-attr]
    folder = save_model(pruned, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(stock(**samples).logits, logits(pruned, samples))
    prompt = samples["input_ids"][:1, :5]
    for network in (pruned.network, stock):
        made = [
            network.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)  # type: ignore[operator]
            for cached in (True, False)
        ]
        assert torch.equal(*made) and made[0].shape == (1, 13)


def attentions(model: PrunableModel) -> list:
    return [model.network.get_submodule(f"{block}.self_attn") for block in model.blocks()]


def test_stock_libraries_load_encoders_without_blocks(tmp_path: Path) -> None:
    model, samples = deep_bert()
    pruned = cut(model, without(model, 1, 3))
    folder = save_model(pruned, tmp_path / "bert")
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = {name: samples[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        assert torch.equal(stock(**inputs).logits, logits(pruned, samples)) and stock.config.num_hidden_layers == 2
    from models.vit import vit

    small = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 1.0}
    image_model = vit(name="deit_tiny_patch16_224", classes=CLASSES, image_size=16, settings=small)
    pictures = batch(3, 16, 16)
    for number, plan in enumerate((without(image_model, 2), without(image_model, 0))):
        shorter = cut(image_model, plan)
        folder = save_model(shorter, tmp_path / f"vit{number}")
        assert "family's own library" in how_to_load(folder)
        with torch.inference_mode():
            found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pictures["inputs"])
        assert torch.equal(found, logits(shorter, pictures))


def states(model: PrunableModel, samples: Batch) -> list[Tensor]:
    """The stream before every block and behind the last, from hooks of its own."""
    seen: list[Tensor] = []
    first = model.network.get_submodule(model.blocks()[0])
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with captured(model.network, model.blocks()) as found:
        logits(model, samples)
    handle.remove()
    given = [found[name] for name in model.blocks()]
    return [*seen, *(x if isinstance(x, Tensor) else x[0] for x in given)]


def slow_cosine(x: Tensor, y: Tensor) -> float:
    a, b = x.double().tolist(), y.double().tolist()
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def mask_of(samples: Batch, stream: list[Tensor]) -> Tensor:
    return samples.get("attention_mask", torch.ones(stream[0].shape[:2]))


def test_block_influence_is_that_of_a_slow_loop(deep: tuple[PrunableModel, Batch]) -> None:
    model, samples = deep
    stream = states(model, samples)
    real = [tuple(at) for at in mask_of(samples, stream).nonzero().tolist()]
    found = block_influence(model, bundle_of(samples))
    for layer, (before, after) in enumerate(zip(stream, stream[1:], strict=False)):
        wanted = 1 - sum(slow_cosine(before[at], after[at]) for at in real) / len(real)
        assert float(found[layer]) == pytest.approx(wanted, abs=1e-5)


def test_angular_distance_is_that_of_a_slow_loop(deep: tuple[PrunableModel, Batch]) -> None:
    model, samples = deep
    stream = states(model, samples)
    lasts = [int(row.nonzero()[-1]) for row in mask_of(samples, stream)]
    found = angular_distances(model, bundle_of(samples))
    assert {size: len(values) for size, values in found.items()} == {1: 4, 2: 3, 3: 2}
    for size, values in found.items():
        for first in range(len(values)):
            turns = [
                math.acos(slow_cosine(stream[first][b, t], stream[first + size][b, t])) for b, t in enumerate(lasts)
            ]
            assert float(values[first]) == pytest.approx(sum(turns) / len(turns) / math.pi, abs=1e-4)


def test_the_last_block_is_not_judged_behind_the_final_norm() -> None:
    """What `hidden_states` ends with would give another score."""
    model, samples = DEEP["llama"]()
    with torch.inference_mode():
        hidden = model.network(**samples, output_hidden_states=True).hidden_states
    real = samples["attention_mask"].bool()
    trap = float(1 - cosines(hidden[-2][real], hidden[-1][real], "trap").mean())
    found = float(block_influence(model, bundle_of(samples))[-1])
    assert abs(found - trap) > 0.01
    stream = states(model, samples)
    assert found == pytest.approx(float(1 - cosines(stream[-2][real], stream[-1][real], "own").mean()), abs=1e-5)


@pytest.mark.parametrize("score", ["block_influence", "angular_window"])
def test_batches_padding_and_their_order_do_not_matter(score: str) -> None:
    model, samples = DEEP["llama"]()
    method = Depth(score=score)  # type: ignore[arg-type]
    first = method.rank(model, bundle_of(samples, batches=1)).only()
    backwards = {name: tensor.flip(0) for name, tensor in samples.items()}
    pads = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in samples.items()}
    for other in (bundle_of(samples, batches=6), bundle_of(backwards, batches=4), bundle_of(pads, batches=2)):
        found = method.rank(model, other).only()
        assert found.keys() == first.keys()
        assert all(torch.allclose(found[name], first[name], atol=1e-6) for name in first)
    fewer = method.rank(model, bundle_of({name: tensor[:2] for name, tensor in samples.items()}, batches=1)).only()
    assert any(not torch.allclose(fewer[name], first[name], atol=1e-4) for name in first), "samples must count"


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_product_of_all_tokens_with_all() -> None:
    x, y = torch.randn(3000, 4), torch.randn(3000, 4)
    with Largest() as seen:
        cosines(x, y, "x")
    assert seen.elements == x.numel()


def test_cosines_are_clamped_float32_and_never_nan() -> None:
    x = torch.randn(200, 7)
    assert float(cosines(x, 3 * x, "x").max()) <= 1 and angles(x, -x, "x").allclose(torch.ones(200), atol=1e-3)
    half = x.bfloat16()
    assert cosines(half, half, "x").dtype == torch.float32
    for value in (0.0, math.nan, math.inf):
        broken = x.clone()
        broken[3] = value
        with pytest.raises(RunError, match="block 7: 1 of 200 cosines are NaN"):
            cosines(broken, x, "block 7")


@pytest.mark.parametrize("score", ["block_influence", "angular_window"])
def test_a_state_without_direction_is_an_error(score: str) -> None:
    model, samples = DEEP["llama"]()
    with torch.no_grad():
        model.network.get_parameter("model.embed_tokens.weight").zero_()
    with pytest.raises(RunError, match="cosines are NaN; every state must be finite and longer than 0"):
        Depth(score=score).rank(model, bundle_of(samples))  # type: ignore[arg-type]
    assert not is_hooked(model.network)


def test_the_last_token_is_that_before_the_padding() -> None:
    x = torch.zeros(3, 4, 2)
    right_left = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert last_tokens({"attention_mask": right_left}, x).tolist() == [1, 3, 3]
    assert last_tokens({}, x).tolist() == [3, 3, 3]
    with pytest.raises(RunError, match="nothing but padding"):
        last_tokens({"attention_mask": right_left * 0}, x)


def test_what_goes() -> None:
    single = Scores({"block_influence": {"blocks": torch.tensor([0.9, 0.1, 0.5, 0.1, 0.3])}})
    assert [kept_blocks(single, 5, n) for n in (0, 1, 2, 3)] == [
        (0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 2, 4), (0, 2)
    ]  # fmt: skip
    windows = {"windows_of_1": torch.tensor([0.3, 0.1, 0.2]), "windows_of_2": torch.tensor([0.1, 0.4])}
    found = Scores({"angular_window": windows})
    assert kept_blocks(found, 3, 1) == (0, 2) and kept_blocks(found, 3, 2) == (2,), "block 0 may go"


def planned(method: Depth, model: PrunableModel, samples: Batch) -> Plan:
    costs = cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})
    method.check(costs)
    return method.plan(model, method.rank(model, bundle_of(samples)), costs)


@pytest.mark.parametrize("score", ["block_influence", "angular_window"])
def test_ratios_and_numbers(score: str) -> None:
    model, samples = toy()
    for given, gone in ((dict(ratio=0.0), 0), (dict(ratio=0.25), 1), (dict(ratio=0.3), 2), (dict(ratio=0.75), 3),
                        (dict(blocks=0), 0), (dict(blocks=2), 2), ({}, 1)):  # fmt: skip
        plan = planned(Depth(score=score, **given), model, samples)  # type: ignore[arg-type]
        assert plan.blocks is not None and len(plan.blocks.removed) == gone and plan.ratio_reached == gone / 4
        assert plan.is_identity == (gone == 0)
        left = cost_model(cut(model, plan), {"inputs": samples["inputs"][:1]})
        for name in ("macs", "params"):
            whole = cost_model(model, {"inputs": samples["inputs"][:1]}).total(name)
            assert plan.details[f"{name}_removed"] == pytest.approx(1 - left.total(name) / whole)
    by_macs = planned(Depth(score=score, budget="macs", ratio=0.4), model, samples)  # type: ignore[arg-type]
    assert by_macs.blocks is not None and len(by_macs.blocks.removed) == 2 and by_macs.ratio_reached >= 0.4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(ratio=0.9), r"prune.ratio=0.9: would leave 0 of 4 blocks .* at most 0.75"),
        (dict(ratio=0.99, budget="macs"), "prune.ratio=0.99: would leave .* of the model, but with one block left"),
        (dict(blocks=4), "prune.blocks=4: must be below 4, all blocks that the model has"),
        (dict(blocks=9), "prune.blocks=9: must be below 4"),
    ],
)
def test_removing_all_blocks_is_refused_before_any_work(given: dict, message: str) -> None:
    model, samples = toy()
    with pytest.raises(InputError, match=message):
        Depth(**given).check(cost_model(model, {"inputs": samples["inputs"][:1]}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(ratio=1.0), r"ratio=1.0 must be in \[0"),
        (dict(ratio=-0.1), "ratio=-0.1 must be in"),
        (dict(blocks=-1), "blocks=-1 must be at least 0"),
        (dict(score="shortest"), "score='shortest' must be one of block_influence, angular_window"),
        (dict(ratio=0.5, blocks=2), "prune.ratio=0.5, prune.blocks=2: give one of the two"),
    ],
)
def test_settings_that_make_no_sense(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Depth(**given)


def test_models_whose_blocks_stay_are_refused_by_name() -> None:
    for name, why in (("resnet_basic", "changes width and resolution"), ("fused_qkv", "not known to keep the shape")):
        model, samples = ADAPTERS[name]()
        with pytest.raises(InputError, match=f"prune=depth: no block of this model can be removed: .*{why}"):
            Depth().check(cost_model(model, {n: t[:1] for n, t in samples.items()}))
        with pytest.raises(InputError, match=f"model={model.name}: no block can be removed: .*{why}"):
            model.keep_blocks([0])
    model, samples = toy()
    model.reduce_tokens(Reduction((0, 1, 1, 0), "mlp"))
    with pytest.raises(InputError, match="its tokens are merged on their way"):
        Depth().check(cost_model(model, {"inputs": samples["inputs"][:1]}))


def test_a_damaged_manifest_names_its_blocks(tmp_path: Path) -> None:
    model, _ = DEEP["llama"]()
    folder = save_model(cut(model, without(model, 1)), tmp_path / "model")
    path = folder / "manifest.json"
    text = path.read_text()
    assert '"blocks": [\n  0,\n  2,\n  3\n ]' in text
    for wrong in ("[0, 2, 9]", "[]", '"all"', "[2, 0]", "7"):
        path.write_text(text.replace("[\n  0,\n  2,\n  3\n ]", wrong))
        with pytest.raises(InputError, match="blocks of manifest.json are damaged"):
            llama(checkpoint=str(folder))


def test_distillation_holds_each_block_against_its_own(tmp_path: Path) -> None:
    model, samples = toy()
    pruned = cut(model, without(model, 1))
    done = Distill(epochs=1, features=1.0).recover(pruned, model, bundle_of(samples), Store(tmp_path), 0)
    assert done.model.block_origin == (0, 2, 3) and len(done.model.blocks()) == 3


@pytest.mark.parametrize("score", ["block_influence", "angular_window"])
def test_it_runs_from_the_command_line(score: str, composed: Compose, tmp_path: Path) -> None:
    sizes = ("model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 3, num_attention_heads: 4, "
             "num_key_value_heads: 2, max_position_embeddings: 64}")  # fmt: skip
    short = ("data.length=32", "data.calibration_length=16", "data.calibration_samples=8", "data.train_samples=20",
             "data.calibration_batch_size=4", "data.validation_samples=4", "model.training.epochs=1")  # fmt: skip
    given = ("+experiment=tiny_llama_depth", sizes, f"prune.score={score}", f"storage={tmp_path}/s")
    record = run(composed(*given, *short), tmp_path)
    assert record.status == "ok" and record.method == f"depth_{score}" and "Removed: " in record.to_markdown()
    assert (tmp_path / "plots" / f"scores_{score}.png").is_file() and (tmp_path / "model" / "config.json").is_file()
    assert "loads with the family" in str(record.saved) and record.to_json()["plan"]["blocks"]["count"] == 3
