"""Mask2Former: transformers' own outputs, names and folders, blocks that are no chain, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from data.segmentation_task import Segmentation
from evals.macs import counted_macs
from models import load
from models.base import Slices
from models.checkpoint import how_to_load, save_model
from models.cost import cost_model
from models.hf import quiet
from models.mask2former import Mask2Former, mask2former
from models.mask2former_names import from_published, to_published
from models.mask2former_units import BACKBONE, MASK_FEATURES
from prune.base import Plan
from prune.optin.candidates import group_losses
from prune.optin.exact import exact_losses
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings, observe
from prune.rankers.fisher import Fisher
from prune.surgery import cut, masked
from tests.adapters import bundle_of
from tests.mask2former_models import BACKBONE as SWIN
from tests.mask2former_models import IMAGE, SETTINGS, images, least_mask2former, small_mask2former, stirred_answers
from tests.modules import CLASSES
from tests.test_contract import logits, random_plan
from utils.errors import InputError
from utils.hooks import hooked, watched


def stock(**changed: Any) -> Mask2FormerForUniversalSegmentation:
    """Transformers' own network."""
    config = Mask2FormerConfig(**{**SETTINGS, "num_labels": CLASSES, **changed})
    network = Mask2FormerForUniversalSegmentation(config).eval()
    stirred_answers(network)
    return network


def stock_folder(folder: Path, **changed: Any) -> tuple[Path, Mask2FormerForUniversalSegmentation]:
    network = stock(**changed)
    with quiet():
        network.save_pretrained(folder)
    return folder, network


def answers(network: Any, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        found = network(inputs, output_hidden_states=True)
    return torch.cat([found.class_queries_logits, found.masks_queries_logits.flatten(2)], dim=-1)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_stock_folder_answers_as_transformers_does(pre_norm: bool, tmp_path: Path) -> None:
    folder, network = stock_folder(tmp_path / "stock", pre_norm=pre_norm)
    model, batch = mask2former(checkpoint=str(folder), classes=CLASSES), images()
    assert model.has_weights and model.name == "stock"
    expected = answers(network, batch["inputs"])
    assert expected.shape == (3, 5, CLASSES + 1 + 16 * 24)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)


def test_names_are_those_that_transformers_publishes(tmp_path: Path) -> None:
    folder, _ = stock_folder(tmp_path / "stock")
    theirs, model = load_file(folder / "model.safetensors"), mask2former(checkpoint=str(folder))
    unread = {name for name in theirs if "encoder.swin.layernorm" in name}
    ours = load_file(save_model(model, tmp_path / "ours") / "model.safetensors")
    assert ours.keys() == theirs.keys() - unread and len(unread) == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    own = model.network.state_dict()
    back = from_published(to_published(own))
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_transformers_loads_uniform_neurons(tmp_path: Path) -> None:
    model, batch = small_mask2former(), images()
    half = {g.name: torch.arange(1, g.count, 2) for g in model.unit_groups() if g.kind == "neuron"}
    pruned = cut(model, Plan.of(model, half))
    folder = save_model(pruned, tmp_path / "pruned")
    assert "own library" in how_to_load(folder)
    with quiet():
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    network, found = loaded
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    torch.testing.assert_close(answers(network.eval(), batch["inputs"]), logits(pruned, batch), rtol=1e-6, atol=1e-6)


def test_what_transformers_cannot_say_says_why_and_reloads(tmp_path: Path) -> None:
    model, batch = small_mask2former(), images()
    (heads, *_), neurons = ([g for g in model.unit_groups() if g.kind == kind] for kind in ("head", "neuron"))
    plans = {
        "ties the width of a head": Plan.of(model, {heads.name: torch.tensor([], dtype=torch.int64)}),
        "one ratio of neurons to width": Plan.of(model, {neurons[0].name: torch.arange(3)}),
        "one number of neurons for all layers": Plan.of(model, {neurons[-1].name: torch.arange(3)}),
    }
    for why, plan in plans.items():
        pruned = cut(model, plan)
        folder = save_model(pruned, tmp_path / "pruned")
        assert why in how_to_load(folder)
        again = mask2former(checkpoint=str(folder), classes=CLASSES)
        assert torch.equal(logits(again, batch), logits(pruned, batch))
        assert again.preprocessing == model.preprocessing and again.origin.keys() == pruned.origin.keys()
        assert torch.equal(answers(load(folder), batch["inputs"]), logits(pruned, batch))


def test_a_pruned_folder_is_pruned_further(tmp_path: Path) -> None:
    model, batch = small_mask2former(), images()
    once = cut(model, random_plan(model, 1, keep=0.7))
    again = mask2former(checkpoint=str(save_model(once, tmp_path / "once")))
    plan = random_plan(again, 2, keep=0.6)
    with masked(again, plan):
        expected = logits(again, batch)
    twice = cut(again, plan)
    assert (logits(twice, batch) - expected).abs().max() <= 1e-5
    saved = mask2former(checkpoint=str(save_model(twice, tmp_path / "twice")))
    assert torch.equal(logits(saved, batch), logits(twice, batch))
    assert all(torch.equal(saved.origin[name], units) for name, units in twice.origin.items())


def test_kept_heads_keep_their_own_biases() -> None:
    """Negative control: the bias table of other heads than those kept is seen."""
    model, batch = small_mask2former(), images()
    group = next(g for g in model.unit_groups() if g.kind == "head" and g.count == 4)
    plan = Plan.of(model, {group.name: torch.tensor([1, 3])})
    with masked(model, plan):
        expected = logits(model, batch)
    groups = model.unit_groups()
    assert any("relative_position_bias_table" in part.tensor for part in group.producers)

    def swapped(part: Slices) -> Slices:
        return replace(part, index=part.index.flip(0)) if part.tensor.endswith("bias_table") else part

    wrong = replace(group, producers=tuple(map(swapped, group.producers)))
    model.unit_groups = lambda: tuple(wrong if g.name == group.name else g for g in groups)  # type: ignore[method-assign]
    assert (logits(cut(model, plan), batch) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(64, 96), (32, 64)])
def test_macs_are_what_torch_counts(size: tuple[int, int]) -> None:
    model, example = small_mask2former(), images(1, size)
    for plan in (Plan.of(model, {}), random_plan(model, 1), random_plan(model, 0, keep=0.0)):
        pruned = cut(model, plan)
        kept = {group.name: len(group.kept) for group in plan.groups}
        counted = counted_macs(pruned, example)
        assert cost_model(model, example).total("macs", kept) == cost_model(pruned, example).total("macs") == counted
    features: Any = model.network.get_submodule(MASK_FEATURES)
    predictions, pixels = SETTINGS["decoder_layers"], size[0] * size[1] // 16
    masks = [t for t in cost_model(model, example).terms if not t.lengths]
    assert [t.macs for t in masks] == [predictions * SETTINGS["num_queries"] * features.out_channels * pixels]


def test_blocks_run_in_order_and_points_once() -> None:
    model, order = small_mask2former(), []
    points = model.feature_points()
    assert len(points) == len(model.blocks()) == 5 + 2 + 3
    with watched(model.network, [*model.blocks(), *points], lambda name, output: order.append(name)):
        logits(model, images(1))
    assert [name for name in order if name in model.blocks()] == list(model.blocks())
    assert Counter(order) == Counter([*model.blocks(), *points])
    assert [g.layer for g in model.unit_groups()] == sorted(g.layer for g in model.unit_groups())


def segmentation() -> tuple[Mask2Former, Any]:
    return small_mask2former(), bundle_of(images(2), batches=1)


def test_what_ran_before_a_layer_does_not_run_again() -> None:
    model, data = segmentation()
    with torch.inference_mode():
        teacher = observe(model, data.calibration[0], Settings())
        group = model.unit_groups()[-1]
        runs: Counter[str] = Counter()
        first = model.network.get_submodule(f"{BACKBONE}.swin.embeddings.patch_embeddings.projection")
        own = model.network.get_submodule(group.consumer.module.removesuffix("fc2") + "cross_attn.q_proj")
        counted = [(first, lambda *_: runs.update(["embedding"])), (own, lambda *_: runs.update(["own"]))]
        with hooked(after=counted):
            group_losses(model, data, teacher, group, Settings(memory_gb=1e-9), lambda name: None)
    # one pass records what ran before, one the layer's own calls; candidates then run neither
    assert runs == {"embedding": 2, "own": 2} and group.count > 2


def test_stacked_candidates_score_as_single_ones() -> None:
    model, samples = least_mask2former()
    data, groups = bundle_of(samples, batches=3), model.unit_groups()
    with torch.inference_mode():
        teacher = observe(model, data.calibration[0], Settings())
        for group in (groups[2], groups[-5], groups[-4], groups[-3], groups[-2], groups[-1]):
            alone, stacked = (
                group_losses(model, data, teacher, group, Settings(memory_gb=gb), lambda name: None) for gb in (1e-9, 4)
            )
            for term in ("md", "kd"):
                torch.testing.assert_close(stacked[term], alone[term], rtol=2e-2, atol=2e-5)
            assert float(stacked["kd"].max()) > 1e-4


def test_the_sketch_ranks_backbone_neurons_as_the_exact_losses() -> None:
    model, samples = least_mask2former()
    data = bundle_of({name: tensor[:2] for name, tensor in samples.items()}, batches=1)
    exact = exact_losses(model, data, Settings(), kinds=["neuron"])
    sketch = sketched_losses(model, data, Settings(), probes=64)
    names = [g.name for g in model.unit_groups() if g.kind == "neuron" and g.name.startswith(BACKBONE)]
    for term, least in (("md", 0.94), ("kd", 0.88)):
        both = torch.stack([torch.cat([found[term][name] for name in names]) for found in (exact, sketch)])
        assert torch.corrcoef(both.argsort(dim=1).argsort(dim=1).double())[0, 1] > least


def test_a_probe_measures_the_divergence() -> None:
    task, batch = Segmentation(3, (4, 4)), images(2)
    wanted = torch.randn(2, 5, 3 + 1 + 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-3 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator, squares = torch.Generator().manual_seed(2), []
    for _ in range(1500):
        given = wanted.clone().requires_grad_(True)
        task.probe(given, batch, generator).backward()
        assert given.grad is not None
        squares.append(float((given.grad * step).sum() ** 2))
    # the divergence itself, in double precision: one half of the quadratic form of its Hessian
    shares, inside = wanted[..., :4].softmax(-1), wanted[..., 4:].sigmoid()
    of_class = (shares * step[..., :4] ** 2).sum(-1) - (shares * step[..., :4]).sum(-1) ** 2
    of_mask = (inside * (1 - inside) * step[..., 4:] ** 2).mean(-1)
    assert sum(squares) / len(squares) == pytest.approx(float((of_class + of_mask).sum()), rel=0.15)
    assert float(task.deviation(wanted + step, wanted, batch).sum()) == pytest.approx(
        float((of_class + of_mask).sum()) / 2, rel=0.2
    )


def test_images_are_prepared_as_the_folder_says(tmp_path: Path) -> None:
    folder, _ = stock_folder(tmp_path / "stock")
    processor = {"size": {"shortest_edge": 500, "longest_edge": 900}, "image_mean": [0.1, 0.2, 0.3], "ignore_index": 7}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = mask2former(checkpoint=str(folder))
    assert model.preprocessing.input_size == (3, 512, 512) and model.preprocessing.mean == (0.1, 0.2, 0.3)
    saved = save_model(mask2former(checkpoint=str(folder), image_size=IMAGE), tmp_path / "saved")
    kept = json.loads((saved / "preprocessor_config.json").read_text())
    assert kept["size"] == {"height": 64, "width": 96} and kept["ignore_index"] == 7
    assert mask2former(checkpoint=str(saved)).preprocessing.input_size == (3, 64, 96)
    assert mask2former(checkpoint=str(saved), image_size=32).preprocessing.input_size == (3, 32, 32)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="preprocessor_config.json is damaged"):
        mask2former(checkpoint=str(folder))


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = stock_folder(tmp_path / "stock")
    with pytest.raises(InputError, match="first difference at the class predictor: it answers in 7 classes.* has 150"):
        mask2former(checkpoint=str(folder), classes=150)
    saved = save_model(mask2former(checkpoint=str(folder)), tmp_path / "saved")
    with pytest.raises(InputError, match="was saved with classes=7, the data has 19"):
        mask2former(checkpoint=str(saved), classes=19)
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(small).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="its configuration is that of a bert; model=mask2former needs a mask2former"):
        mask2former(checkpoint=str(tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoder_layers": 3}))
    with pytest.raises(InputError, match="first difference at '.*layers.2.*': the file has nothing"):
        mask2former(checkpoint=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded by transformers"):
        mask2former(checkpoint=str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give model.checkpoint=<folder>, model.name=<hub name>, or model.settings"),
        ({"settings": {"model_type": "bert"}}, "model_type=bert; must be mask2former"),
        (
            {"settings": {"backbone_config": SWIN | {"num_heads": [3, 2, 2, 4]}}},
            r"num_heads=\[3, 2, 2, 4\] must divide the stages' widths \[8, 16, 32, 64\]",
        ),
        ({"settings": {"backbone_config": ResNetConfig().to_dict()}}, "its backbone is resnet; covered is swin"),
        ({"settings": {**SETTINGS, "num_attention_heads": 5}}, "cannot build a mask2former from them"),
        ({"settings": SETTINGS, "image_size": 100}, "image_size=100: must be multiples of 32"),
        ({"settings": SETTINGS, "image_size": [64, 64, 64]}, "image_size"),
        ({"name": "facebook/mask2former-swin-tiny-ade-semantic"}, "model.name=facebook/mask2former-swin-tiny-ade"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mask2former(**arguments)


def test_what_its_blocks_do_not_allow_is_refused() -> None:
    model, data = segmentation()
    with pytest.raises(InputError, match="no block can be removed: they lie in three networks"):
        model.keep_blocks([0])
    with pytest.raises(InputError, match="are no chain, as the released code needs"):
        exact_losses(model, data, Settings(), leak=True)
    assert model.why_not_mergeable() and model.why_not_droppable()


def test_training_reaches_every_weight() -> None:
    model, data = segmentation()
    batch = data.calibration[0]
    data.task.loss(model.logits(batch), batch).backward()
    left = [name for name, p in model.network.named_parameters() if p.grad is None]
    assert left == []


def test_a_plan_within_the_budget_is_kept_to_the_unit() -> None:
    model, data = segmentation()
    example = {"inputs": data.calibration[0]["inputs"][:1]}
    ranker, costs = Fisher(ratio=0.2), cost_model(model, example)
    plan = ranker.plan(model, ranker.rank(model, data), costs)
    macs = counted_macs(cut(model, plan), example)
    assert macs <= 0.8 * costs.total("macs") and macs > 0.78 * costs.total("macs")
