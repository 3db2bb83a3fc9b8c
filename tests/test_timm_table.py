"""Families of timm by a row: the same contracts, what is refused by name, and that a further one costs a row alone."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import beit, eva
from torch.nn.functional import cosine_similarity

import models.timm_table
from data.base import DataBundle
from models import load
from models.base import Batch, PrunableModel
from models.checkpoint import save_model
from models.merging import Reduction
from models.timm_layout import AttentionLayout, layout_of
from models.timm_table import timm_model
from prune.base import Plan
from prune.depth.method import Depth
from prune.optin.exact import exact_losses
from prune.optin.teacher import Settings
from prune.rankers.fisher import Fisher
from prune.rankers.magnitude import Magnitude
from prune.sensitivity.method import Sensitivity
from prune.surgery import cut, masked
from prune.weights.method import WeightSparsity
from prune.weights.sparsegpt import SparseGPT
from prune.weights.wanda import Wanda
from tests import test_contract as contract
from tests.adapters import bundle_of
from tests.modules import CLASSES, stirred
from tests.sparse import applied_to, masks_of
from tests.test_cli import ROOT
from tests.test_optin import plain_losses
from tests.timm_small import BUILT, SIZES, timm_small
from utils.errors import InputError
from utils.hooks import hooked

KINDS = (*SIZES, *BUILT)
# the others are among the adapters, so that every contract test covers them
FURTHER = [kind for kind in KINDS if kind not in ("swin", "eva02", "convnext")]
CONTRACTS = (
    contract.test_full_plan_is_the_identity,
    contract.test_masked_logits_equal_shrunk_logits,
    contract.test_in_double_precision_they_are_equal_to_1e_12,
    contract.test_parameters_and_macs_are_as_predicted,
    contract.test_a_pruned_model_can_be_pruned_again,
    contract.test_the_input_model_is_untouched_and_the_copy_has_no_hooks,
)


def case(kind: str) -> tuple[PrunableModel, Batch, DataBundle]:
    model, samples = timm_small(kind)
    return model, samples, bundle_of(samples, batches=2)


@pytest.mark.parametrize("kind", FURTHER)
def test_every_contract_holds(kind: str) -> None:
    for holds in CONTRACTS:
        holds(timm_small(kind))


@pytest.mark.parametrize("kind", FURTHER)
def test_rankers_leave_no_trace_and_take_emptied_models(kind: str) -> None:
    for ranker in (Fisher(), Magnitude()):
        contract.test_ranking_leaves_no_trace(timm_small(kind), ranker)  # type: ignore[arg-type]
        contract.test_emptied_models_can_be_ranked(timm_small(kind), ranker)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SIZES)
def test_a_dense_network_is_timms_own(kind: str) -> None:
    model, samples = timm_small(kind)
    name, side, sizes = SIZES[kind]
    given = {"num_classes": CLASSES, **({"img_size": side} if side else {}), **sizes}
    network = timm.create_model(name, **given).eval()  # type: ignore[arg-type]
    network.load_state_dict(model.network.state_dict())
    with torch.inference_mode():
        difference = network(samples["inputs"]) - contract.logits(model, samples)
    assert difference.abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: beit.Attention(12, num_heads=3, qkv_bias=True, window_size=(2, 2), attn_head_dim=4), (2, 5, 12)),
        (lambda: eva.EvaAttention(12, num_heads=3, scale_norm=False, gated=True, rotate_half=True), (2, 5, 12)),
        (lambda: timm.models.metaformer.Attention(64, head_dim=32), (2, 5, 64)),
    ],
    ids=["beit", "gated", "plain"],
)
def test_an_attention_under_another_forward_gives_the_same(make: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = stirred(make()).eval()  # type: ignore[operator]
    x = torch.randn(shape)
    layout = layout_of(attention, models.timm_layout.LAYOUTS)  # type: ignore[attr-defined]
    assert isinstance(layout, AttentionLayout)
    with torch.inference_mode():
        expected = attention(x)
        assert (models.timm_layout.runnable(attention, layout)(x) - expected).abs().max() <= 2e-6  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["swin_head_width", "eva_split", "xcit", "poolformer", "mixer"])
def test_losses_equal_a_plain_loop(kind: str) -> None:
    model, _, data = case(kind)
    with torch.inference_mode():
        expected = plain_losses(model, data, Settings())
    for term, groups in exact_losses(model, data, Settings()).items():
        for group, values in groups.items():
            scale = expected[term][group].abs().max().clamp(min=1e-2)
            assert (values - expected[term][group]).abs().max() <= 1e-3 * scale, (term, group)


@pytest.mark.parametrize("kind", SIZES)
def test_any_cut_reloads_bit_equal(kind: str, tmp_path: Path) -> None:
    model, samples = timm_small(kind)
    plans = (contract.random_plan(model, 3), contract.random_plan(model, 0, keep=0.0), Plan.of(model, {}))
    for number, plan in enumerate(plans):
        pruned = cut(model, plan)
        network = load(save_model(pruned, tmp_path / str(number)))
        with torch.inference_mode():
            assert torch.equal(network(samples["inputs"]), contract.logits(pruned, samples))


def test_timm_loads_what_is_whole(tmp_path: Path) -> None:
    model, samples = timm_small("beit")
    stock = timm.create_model(f"local-dir:{save_model(model, tmp_path / 'model')}", pretrained=True).eval()
    with torch.inference_mode():
        assert (stock(samples["inputs"]) - contract.logits(model, samples)).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", ["swin", "swin_v2", "beit", "convnext", "xcit", "caformer", "mixer"])
@pytest.mark.parametrize("method", [Wanda(ratio=0.5), SparseGPT(ratio=0.5)], ids=["wanda", "sparsegpt"])
def test_weights_go_block_by_block_over_stages(kind: str, method: WeightSparsity, tmp_path: Path) -> None:
    model, samples, data = case(kind)
    applied = applied_to(method, model, data, tmp_path)
    for name, mask in masks_of(applied.model, applied.plan).items():
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.15), name
    assert torch.isfinite(contract.logits(applied.model, samples)).all()


@pytest.mark.parametrize("kind", ["swin", "mixer"])
def test_what_a_layer_loses_is_measured_over_stages(kind: str) -> None:
    model, samples, data = case(kind)
    found = Sensitivity(grid=(0.5,), sweep=("units",), ablate=False).rank(model, data)
    with torch.no_grad():
        dense = [float(data.task.loss(model.logits(batch), batch)) for batch in data.calibration]
    rows = found.facts["rows"]
    assert [row["part"] for row in rows] == [g.name for g in model.unit_groups()]
    for row in rows:
        left = found.terms["fisher"][row["part"]].argsort(stable=True)[row["removed"] :].sort().values
        pruned = cut(model, Plan.of(model, {row["part"]: left}))
        with torch.no_grad():
            losses = [float(data.task.loss(pruned.logits(batch), batch)) for batch in data.calibration]
        change = sum(now - before for now, before in zip(losses, dense, strict=True)) / len(dense)
        assert row["loss_change"] == pytest.approx(change, abs=1e-5), row["part"]


@pytest.mark.parametrize("kind", ["swin", "convnext", "caformer", "mixer"])
def test_influence_of_blocks_is_that_of_a_slow_loop(kind: str) -> None:
    model, samples, data = case(kind)
    found = Depth().rank(model, data).only()["blocks"]
    for at, block in enumerate(model.blocks()):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        module = model.network.get_submodule(block)
        with torch.no_grad(), hooked(after=[(module, lambda m, args, out, seen=seen: seen.append((args[0], out)))]):
            for batch in data.calibration:
                model.logits(batch)
        values = []
        for pair in seen:
            if pair[0].ndim == 4:
                pair = tuple(states.movedim(model.feature_axis, -1) for states in pair)
            before, after = (states.reshape(-1, states.shape[-1]) for states in pair)
            values += [1 - float(cosine_similarity(x, y, dim=0)) for x, y in zip(before, after, strict=True)]
        assert float(found[at]) == pytest.approx(sum(values) / len(values), abs=1e-5), block
    wide = {group.layer: group.consumer for group in model.unit_groups()}
    if kind != "mixer" and len(wide) > 1:
        with pytest.raises(InputError, match="prune.score=angular_window: compares last tokens"):
            Depth(score="angular_window").rank(model, data)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("swin")])
def test_tokens_stay(kind: str) -> None:
    model, samples = timm_small(kind)
    with pytest.raises(InputError, match=f"model={model.name}: merging and dropping tokens are written for"):
        model.reduce_tokens(Reduction((0,) * len(model.blocks()), "attention"))


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("vit_tiny_patch16_224", {}, "is a VisionTransformer; model=timm takes timm's Beit, Eva, ConvNeXt"),
        ("beit_base_patch16_224", {"depth": 2, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
         "cannot be cut exactly: rel_pos_bias is one table"),
        ("beit_base_patch16_224", {"depth": 2, "scale_mlp": True}, "blocks.0.mlp .*Mlp: its norm .* over all neurons"),
        ("eva02_base_patch14_224", {"depth": 1}, "blocks.0.mlp cannot be cut exactly: SwiGLU: its norm normalises"),
        ("eva02_large_patch14_clip_224", {"depth": 1, "scale_mlp": False},
         "blocks.0.attn cannot .*EvaAttention: its norm normalises over all heads"),
        ("vit_small_patch16_rope_mixed_224", {"depth": 1}, "rope has frequencies of its own for every head"),
        ("vit_small_patch16_rope_224", {"depth": 1, "num_kv_heads": 2, "qkv_fused": False},
         "blocks.0.attn cannot .*AttentionRope: several query heads share"),
        ("convnextv2_atto", {}, "stages.0.blocks.0.mlp cannot .*GlobalResponseNormMlp: its GRN"),
        ("gmlp_ti16_224", {}, "blocks.0.mlp_channels cannot .*GatedMlp: its spatial gate"),
        ("beit_bass_patch16_224", {}, "did you mean beit_base_patch16_224"),
        ("convnext_atto", {"img_size": 64}, "timm cannot build it with .*img_size=64"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_named(name: str, settings: dict, why: str) -> None:
    with pytest.raises(InputError, match=f"model.name={name}: .*{why}"):
        timm_model(name=name, settings=settings)


def test_a_size_is_said_once() -> None:
    with pytest.raises(InputError, match="model.settings.num_classes=5: must be left out; model.classes=10 says it"):
        timm_model(name="convnext_atto", classes=10, settings={"num_classes": 5})


EXAMPLE = re.compile(r"```python\n# a row\n(.*?)```", re.DOTALL)


def test_a_further_family_costs_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (text,) = EXAMPLE.findall((ROOT / "docs" / "models.md").read_text())
    name = "inception_next_atto"
    with pytest.raises(InputError, match="is a MetaNeXt; model=timm takes"):
        timm_model(name=name)
    scope: dict = {}
    exec(text, scope)
    monkeypatch.setattr(models.timm_table, "FAMILIES", (*models.timm_table.FAMILIES, scope["ROW"]))
    torch.manual_seed(0)
    model = timm_model(name=name, classes=CLASSES)
    stirred(model.network)
    samples = {"inputs": torch.randn(2, 3, 64, 64), "labels": torch.arange(2)}
    plan = contract.random_plan(model, 1)
    with masked(model, plan):
        expected = contract.logits(model, samples)
    pruned = cut(model, plan)
    difference = (contract.logits(pruned, samples) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max().clamp(min=1)
    network = load(save_model(pruned, tmp_path / "model"))
    with torch.inference_mode():
        assert torch.equal(network(samples["inputs"]), contract.logits(pruned, samples))
