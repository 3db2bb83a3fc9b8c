"""The published shapes at random weights: golden costs, and cutting equals masking at full size."""

from collections.abc import Callable

import pytest
import torch

from evals.macs import counted_macs
from models.base import Batch, PrunableModel
from models.bert import bert
from models.cost import cost_model
from models.resnet import resnet
from models.vit import vit
from prune.surgery import cut, masked
from tests.test_contract import logits, random_plan

Build = Callable[[], PrunableModel]
BERT_BASE = {"model_type": "bert"}  # transformers' defaults are bert-base-uncased's sizes
SHAPES: dict[str, tuple[Build, int, int]] = {
    "deit_tiny": (lambda: vit(name="deit_tiny_patch16_224"), 1_253_683_200, 5_717_416),
    "deit_small": (lambda: vit(name="deit_small_patch16_224"), 4_598_882_304, 22_050_664),
    "deit_base": (lambda: vit(name="deit_base_patch16_224"), 17_563_828_224, 86_567_656),
    "bert_base": (lambda: bert(classes=2, settings=BERT_BASE), 11_174_217_216, 109_483_778),
}


def example(name: str, samples: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(0)
    if name == "bert_base":
        ids = torch.randint(1000, 30000, (samples, 128), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"inputs": torch.randn(samples, 3, 224, 224, generator=generator)}


@pytest.mark.parametrize("name", SHAPES)
def test_golden_costs(name: str) -> None:
    build, macs, params = SHAPES[name]
    costs = cost_model(build(), example(name))
    assert (costs.total("macs"), costs.total("params")) == (macs, params)


@pytest.mark.parametrize(
    ("name", "head", "neuron", "everything"),
    [
        ("deit_small", 24_333_440, 151_296, 4_540_695_552),
        ("bert_base", 27_262_976, 196_608, 11_173_625_856),
    ],
)
def test_golden_unit_costs(name: str, head: int, neuron: int, everything: int) -> None:
    model = SHAPES[name][0]()
    costs = cost_model(model, example(name))

    def unit(group: str) -> int:
        return costs.total("macs") - costs.total("macs", costs.counts | {group: costs.counts[group] - 1})

    kinds = {group.name: group.kind for group in model.unit_groups()}
    found = {name: unit(name) for name in kinds}
    assert {found[n] for n, kind in kinds.items() if kind == "head"} == {head}
    assert {found[n] for n, kind in kinds.items() if kind == "neuron"} == {neuron}
    assert sum(found[n] * costs.counts[n] for n in kinds) == everything


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_cutting_equals_masking(name: str) -> None:
    model = SHAPES[name][0]()
    samples = example(name, samples=2)
    before = logits(model, samples)
    plan = random_plan(model, 0)
    with masked(model, plan):
        expected = logits(model, samples)
    pruned = cut(model, plan)
    assert (logits(pruned, samples) - expected).abs().max() <= 1e-5
    assert (expected - before).abs().max() > 1e-3
    one = example(name)
    kept = {group.name: len(group.kept) for group in plan.groups}
    macs = cost_model(model, one).total("macs", kept)
    assert macs == cost_model(pruned, one).total("macs") == pytest.approx(counted_macs(pruned, one), rel=0.01)
    assert cost_model(model, one).total("params", kept) == sum(p.numel() for p in pruned.network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_residual_networks_cut_as_they_mask(name: str) -> None:
    model = resnet(name=name)
    samples = example(name, samples=2)
    plan = random_plan(model, 0)
    with masked(model, plan):
        expected = logits(model, samples)
    pruned = cut(model, plan)
    assert (logits(pruned, samples) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    one = example(name)
    assert cost_model(pruned, one).total("macs") == pytest.approx(counted_macs(pruned, one), rel=0.01)
