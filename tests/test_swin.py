"""Swin: what its windows, stages and position tables ask of cutting, costs, scores, depth and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from evals.timing import Protocol
from models import load
from models.base import PrunableModel, UnitGroup
from models.checkpoint import save_model
from models.cost import cost_model
from models.merging import Reduction
from models.slicing import keep_units
from models.swin import swin
from prune.base import BlockPlan, Plan
from prune.latency import measured_table, recorded_inputs
from prune.optin.exact import exact_losses
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings
from prune.rankers.optin import Optin
from prune.surgery import cut, masked
from tests.adapters import bundle_of
from tests.modules import CLASSES
from tests.test_contract import logits, random_plan
from tests.timm_small import SIZES, timm_small
from utils.errors import InputError

KINDS = ("swin", "swin_head_width", "swin_v2")
HASTY = Protocol(warmup=1, blocks=2, seconds=0.01, least_calls=2)


def half(model: PrunableModel) -> dict[str, torch.Tensor]:
    """The later half of the units of every group."""
    return {g.name: torch.arange(g.count // 2, g.count) for g in model.unit_groups()}


def test_windows_are_shifted_masked_and_padded() -> None:
    network = timm_small("swin")[0].network
    shifted = network.get_submodule("layers.0.blocks.1")
    assert shifted.shift_size == (1, 1) and shifted.attn_mask.shape == (9, 9, 9)  # type: ignore[union-attr]
    merged = network.get_submodule("layers.1.blocks.1")
    assert merged.input_resolution == (5, 5) and merged.attn_mask.shape == (4, 9, 9)  # type: ignore[union-attr]


def misplaced(group: UnitGroup, kept: torch.Tensor) -> UnitGroup:
    """The same group with the wrong columns of its table."""
    wrong = [
        replace(part, index=part.index.roll(1, 0)) if part.tensor.endswith("bias_table") else part
        for part in group.producers
    ]
    return replace(group, producers=tuple(wrong))


def forgotten(group: UnitGroup, kept: torch.Tensor) -> UnitGroup:
    """The same group without its table."""
    parts = tuple(part for part in group.producers if not part.tensor.endswith("bias_table"))
    return replace(group, producers=parts)


def test_a_table_that_is_not_cut_with_its_heads_is_seen() -> None:
    model, samples = timm_small("swin")
    groups, plan = model.unit_groups(), Plan.of(model, half(model))
    with masked(model, plan):
        expected = logits(model, samples)
    for spoil, seen in ((lambda g, k: g, False), (misplaced, True), (forgotten, True)):
        twin = model.copy()
        keep_units(twin.network, [spoil(g, plan.kept[g.name]) for g in groups], plan.kept)
        try:
            error = float((logits(twin, samples) - expected).abs().max())
        except RuntimeError:
            error = float("inf")
        assert (error > 1e-3) == seen and (seen or error <= 1e-5)


def test_costs_are_those_of_windows_and_stages() -> None:
    model, samples = timm_small("swin")
    kept = {g.name: g.count - 1 for g in model.unit_groups()}
    side, windows = {0: 9, 1: 5}, {0: 9, 1: 4}  # tokens a side, and windows of 9 tokens, the last ones padded
    macs = 81 * 3 * 4 * 8 + 25 * 32 * 16 + 16 * CLASSES  # patches, merging, classifier
    for group in model.unit_groups():
        stage = int(group.name.split(".")[1])
        width = 8 * 2**stage
        if group.kind == "head":
            per_head = windows[stage] * (9 * 4 * width * 4 + 2 * 9 * 9 * 4)
            macs += kept[group.name] * per_head
        else:
            macs += kept[group.name] * side[stage] ** 2 * 2 * width
    costs = cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})
    assert costs.total("macs", kept) == macs


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_dense_sizes_are_the_published_ones(name: str) -> None:
    model = swin(name=name)
    side = 256 if "v2" in name else 224
    costs = cost_model(model, {"inputs": torch.zeros(1, 3, side, side)})
    published = {"swin_tiny_patch4_window7_224": (28_288_354, 4.5e9), "swinv2_tiny_window8_256": (28_347_154, 5.9e9)}
    params, macs = published[name]
    assert costs.total("params") == params and costs.total("macs") == pytest.approx(macs, rel=0.02)


def test_features_lie_on_the_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = timm_small("swin")
    data = bundle_of(samples, batches=2)
    right = exact_losses(model, data, Settings(), kinds=["head"])["md"]
    monkeypatch.setattr(type(model), "feature_axis", 1)
    wrong = exact_losses(model, data, Settings(), kinds=["head"])["md"]
    assert any((right[name] - wrong[name]).abs().max() > 0.01 * right[name].abs().max() for name in right)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_how_many_candidates_are_stacked(kind: str) -> None:
    model, samples = timm_small(kind)
    data = bundle_of(samples, batches=1)
    many, one = (exact_losses(model, data, Settings(memory_gb=gb), kinds=["head"]) for gb in (4.0, 1e-9))
    for term, groups in many.items():
        for name, values in groups.items():
            assert torch.allclose(values, one[term][name], rtol=1e-3, atol=1e-5), (term, name)


def test_the_sketch_ranks_as_the_exact_losses() -> None:
    model, samples = timm_small("swin")
    data = bundle_of(samples, batches=2)
    exact = exact_losses(model, data, Settings(), kinds=["neuron"])
    sketch = sketched_losses(model, data, Settings(), probes=100)["md"]
    names = [g.name for g in model.unit_groups() if g.kind == "neuron"]
    pairs = [(exact["md"][name] + exact["md_final"][name], sketch[name]) for name in names]
    found = [float(spearmanr(*pair)[0]) for pair in pairs]  # type: ignore[arg-type]
    assert min(found) > 0.6, dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_may_lose_all_of_its_blocks(kind: str, tmp_path: Path) -> None:
    model, samples = timm_small(kind)
    first = sum(block.startswith("layers.0.") for block in model.blocks())
    blocks = BlockPlan(tuple(range(first, len(model.blocks()))), len(model.blocks()))
    plan = Plan.of(model, random_plan(model, 2).kept, blocks=blocks)
    with masked(model, plan):
        expected = logits(model, samples)
    pruned = cut(model, plan)
    assert (logits(pruned, samples) - expected).abs().max() <= 1e-5
    assert pruned.blocks()[0] == "layers.1.blocks.0" and len(pruned.feature_points()) == len(pruned.blocks()) + 1
    network = load(save_model(pruned, tmp_path / "model"))
    with torch.inference_mode():
        assert torch.equal(network(samples["inputs"]), logits(pruned, samples))


@pytest.mark.parametrize("kind", ["swin"])
def test_time_is_measured_block_by_block(kind: str) -> None:
    model, samples = timm_small(kind)
    table = measured_table(model, bundle_of(samples), HASTY)
    groups = {g.name: g.count for g in model.unit_groups()}
    assert {name: points[-1][0] for name, points in table.groups.items()} == groups
    assert all(points[0] == (0, 0) for points in table.groups.values())
    inputs = recorded_inputs(model, model.place(samples))
    assert sorted(inputs) == list(range(len(model.blocks())))


def test_shifted_blocks_are_timed_by_themselves() -> None:
    from prune.latency import _by_layer, _shape_of

    model, samples = timm_small("swin")
    inputs = recorded_inputs(model, model.place(samples))
    layers = _by_layer(model, inputs)
    plain, shifted = (_shape_of(model, layer, layers[layer], inputs) for layer in (0, 1))
    assert plain != shifted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [True, False])
def test_tokens_stay(kind: str, merged: bool) -> None:
    model, samples = timm_small(kind)
    with pytest.raises(InputError, match=f"model={model.name}: its windows need every token"):
        model.reduce_tokens(Reduction((0,) * len(model.blocks()), "attention"))
    costs = cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})
    assert "windows" in str(costs.why_no_tokens if merged else costs.why_no_dropping)


def test_the_released_search_has_one_price_a_kind(tmp_path: Path) -> None:
    model, samples = timm_small("swin")
    with pytest.raises(InputError, match="prune.mode=compat: .*one price a head.*has 2 sizes"):
        Optin(mode="compat").resolved(tmp_path, model, bundle_of(samples))


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth", "folder"])
def test_weights_in_timms_files_load(file: str, tmp_path: Path) -> None:
    name, side, sizes = SIZES["swin"]
    network = timm.create_model(name, num_classes=CLASSES, img_size=side, **sizes).eval()  # type: ignore[arg-type]
    tensors = dict(network.state_dict())
    # older files hold what follows from the sizes
    block = "layers.0.blocks.1"
    tensors[f"{block}.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
    tensors[f"{block}.attn_mask"] = torch.zeros(9, 9, 9)
    path = tmp_path / file
    if file == "weights.pth":
        torch.save({"model": tensors}, path)
    else:
        path.mkdir() if file == "folder" else None
        save_file(tensors, path / "model.safetensors" if file == "folder" else path)
    model = swin(name=name, classes=CLASSES, image_size=side, settings=sizes, checkpoint=str(path))
    samples = timm_small("swin")[1]
    with torch.inference_mode():
        assert torch.equal(logits(model, samples), network(samples["inputs"]))


def test_a_misfit_names_the_first_difference(tmp_path: Path) -> None:
    model, _ = timm_small("swin")
    tensors = dict(model.network.state_dict())
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, tmp_path / "weights.safetensors")
    arguments = model.recipe.arguments
    with pytest.raises(InputError, match=rf"'{name}': the file has \(25, 1\), the model \(25, 2\)"):
        swin(**{**arguments, "checkpoint": str(tmp_path / "weights.safetensors")})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("swinv2_cr_tiny_224", {}, "is a SwinTransformerV2Cr; model=swin takes timm's SwinTransformer, SwinTransf"),
        ("deit_tiny_patch16_224", {}, "is a VisionTransformer; model=swin takes"),
        ("swin_tinny_patch4_window7_224", {}, "did you mean swin_tiny_patch4_window7_224"),
        ("swin_tiny_patch4_window7_224", {"window_size": 0}, "cannot build it with .*window_size=0"),
    ],
)
def test_what_is_no_swin_is_named(name: str, settings: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        swin(name=name, settings=settings)
