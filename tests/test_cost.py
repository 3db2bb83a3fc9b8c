"""Costs against published integers and torch's own counter."""

import pytest

from evals.macs import counted_macs
from models.cost import CostModel, cost_model
from models.toy_encoder import toy_encoder
from prune.base import Plan
from tests.adapters import batch


def deit(width: int, heads: int) -> tuple[CostModel, int, int]:
    """The toy encoder at a DeiT's sizes: the same blocks, so the same integers."""
    model = toy_encoder(
        classes=1000, image_size=224, patch_size=16, channels=3, width=width, depth=12, heads=heads, neurons=4 * width
    )
    example = batch(3, 224, 224, samples=1)
    params = sum(p.numel() for p in model.network.parameters())
    return cost_model(model, example), params, counted_macs(model, example)


@pytest.mark.parametrize(
    ("width", "heads", "macs", "params"),
    [(192, 3, 1_253_683_200, 5_717_416), (384, 6, 4_598_882_304, 22_050_664)],
    ids=["deit_tiny", "deit_small"],
)
def test_golden_totals(width: int, heads: int, macs: int, params: int) -> None:
    costs, found_params, counted = deit(width, heads)
    assert costs.total("macs") == macs == counted
    assert costs.total("params") == params == found_params


def test_golden_unit_costs_of_deit_small() -> None:
    costs, *_ = deit(384, 6)

    def unit(name: str) -> int:
        return costs.total("macs") - costs.total("macs", costs.counts | {name: costs.counts[name] - 1})

    assert unit("blocks.5.heads") == 24_333_440
    assert unit("blocks.5.neurons") == 151_296
    everything = sum(unit(name) * count for name, count in costs.counts.items())
    assert everything == 4_540_695_552


def test_cost_of_a_plan_is_what_a_plan_says() -> None:
    model = toy_encoder(classes=10, image_size=8)
    costs = cost_model(model, batch(1, 8, 8, samples=1))
    assert costs.total("macs", {n: len(k) for n, k in Plan.of(model, {}).kept.items()}) == costs.total("macs")
    assert costs.total("macs", dict.fromkeys(costs.counts, 0)) == 16 * 4 * 48 + 48 * 10


def test_a_larger_example_batch_costs_the_same_per_sample() -> None:
    model = toy_encoder(classes=10, image_size=8)
    one, many = (cost_model(model, batch(1, 8, 8, samples=n)).total("macs") for n in (1, 5))
    assert one == many
