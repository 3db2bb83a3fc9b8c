"""Mask2Former with Swin-T at its published size and random weights: 30% of the MACs go, and the rest is the same."""

import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.mask2former import differences, image, swin_tiny, without
from evals.macs import counted_macs
from models.base import Batch
from models.cost import cost_model
from models.mask2former import Mask2Former
from prune.surgery import cut

pytestmark = pytest.mark.slow
RATIO = 0.3


@pytest.fixture(scope="module")
def dense() -> Iterator[Mask2Former]:
    yield swin_tiny(side=512)


def seconds(model: Mask2Former, batch: Batch) -> float:
    """The quickest of a few passes."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.inference_mode():
            model.logits(batch)
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_a_third_of_the_macs_goes_and_the_rest_is_the_same(dense: Mask2Former) -> None:
    plan, batch = without(dense, RATIO), image(dense)
    pruned, costs = cut(dense, plan), cost_model(dense, batch)
    kept = {group.name: len(group.kept) for group in plan.groups}
    assert costs.total("params") == 47_439_633 and costs.total("macs") == 69_225_340_800
    assert costs.total("macs", kept) == cost_model(pruned, batch).total("macs") == counted_macs(pruned, batch)
    assert (1 - RATIO) * 0.999 < costs.total("macs", kept) / costs.total("macs") <= 1 - RATIO
    # a logit within rounding of zero may hide a place or not: one query may then differ by more, most do not
    assert differences(dense, plan, pruned, batch).median() <= 1e-5
    assert seconds(dense, batch) / seconds(pruned, batch) > 1.1


def test_in_double_precision_they_are_equal() -> None:
    model = swin_tiny(side=256)
    plan = without(model, RATIO)
    model.network.double()
    assert differences(model, plan, cut(model, plan), model.place(image(model))).max() <= 1e-12
