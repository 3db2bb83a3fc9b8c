"""MACs as a function of tokens: published integers, and the cost of networks that really merge."""

import pytest
import torch

from evals.base import Subject
from evals.macs import Macs, counted_macs, matching_macs
from models.base import Batch, PrunableModel
from models.cost import cost_model
from models.merging import Reduction
from models.token_cost import token_costs
from models.vit import vit
from prune.base import Plan
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of
from tests.test_contract import random_plan
from tests.test_merging import MODELS, SCHEDULES, merging, why_unfit
from utils.errors import InputError, RunError

# r: MACs and matching of DeiT-S on one 224-pixel image, one protected token
DEIT_SMALL = {
    0: (4_598_882_304, 0),
    4: (4_001_452_032, 5_916_416),
    8: (3_416_457_216, 4_640_768),
    13: (2_702_701_056, 3_410_624),
    16: (2_290_851_840, 2_866_688),
}
AFTER_16 = [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]


@pytest.fixture(scope="module")
def deit_small() -> tuple[PrunableModel, Batch]:
    return vit(name="deit_small_patch16_224"), {"inputs": torch.randn(1, 3, 224, 224)}


@pytest.mark.parametrize(("r", "macs", "matching"), [(r, *figures) for r, figures in DEIT_SMALL.items()])
def test_golden_integers_of_deit_small(deit_small, r: int, macs: int, matching: int) -> None:
    model, example = deit_small
    costs, reduction = token_costs(model, example), Reduction((r,) * 12)
    assert costs.of(reduction) == macs and costs.matching(reduction) == matching
    small = merging(model, reduction)
    executed = cost_model(small, example)
    assert executed.total("macs") == macs and matching_macs(small, executed) == matching
    assert counted_macs(small, example) == macs + matching
    left = AFTER_16 if r == 16 else [197 - r * layer for layer in range(1, 13)]
    assert [mlp for _, mlp in costs.counts(reduction)] == left


@pytest.mark.parametrize("name", MODELS)
def test_the_closed_form_is_what_a_merging_network_costs(name: str) -> None:
    dense, samples = MODELS[name]()
    example = {"inputs": samples["inputs"][:1]}
    emptied = Plan.of(dense, {"blocks.1.heads": torch.tensor([], dtype=torch.int64)})
    for model in (dense, cut(dense, random_plan(dense, 0)), cut(dense, emptied)):
        costs = token_costs(model, example)
        assert costs.of(Reduction((0, 0, 0))) == cost_model(model, example).total("macs")
        for schedule in (s for s in SCHEDULES.values() if not why_unfit(model, s)):
            small = merging(model, schedule)
            executed = cost_model(small, example)
            assert executed.total("macs") == costs.of(schedule) < costs.of(Reduction((0, 0, 0)))
            assert counted_macs(small, example) == costs.of(schedule) + costs.matching(schedule)
            assert executed.tokens == costs, "the closed form does not depend on what is merged now"


def test_any_counts_can_be_asked_for() -> None:
    model, samples = MODELS["toy"]()  # 17 tokens, width 24, 20 neurons, 16 patches of 4 pixels
    costs = token_costs(model, {"inputs": samples["inputs"][:1]})
    expected = 16 * 4 * 24 + 24 * 7
    expected += sum(4 * n * 24 * 24 + 2 * n * n * 24 + 2 * m * 24 * 20 for n, m in ((17, 9), (5, 5), (2, 1)))
    assert costs.total([17, 5, 2], [9, 5, 1]) == expected
    with pytest.raises(InputError, match="has 2 entries for 3 blocks"):
        costs.of(Reduction((1, 1)))


def test_a_model_without_mergeable_tokens_has_none() -> None:
    model, samples = ADAPTERS["bert"]()
    costs = cost_model(model, {name: t[:1] for name, t in samples.items()})
    assert costs.tokens is None and costs.why_no_tokens == "it has no tokens that can be merged"


def test_matching_is_listed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = MODELS["toy"]()
    small = merging(model, Reduction((8, 0, 0)))
    dense, merged = Macs().measure([Subject(m, bundle_of(samples)) for m in (model, small)])
    assert "matching" not in dense["macs"].details and merged["macs"].details["matching"] == 6 * 9 * 8
    assert merged["macs"].details["flop_counter"] == int(merged["macs"].value or 0) + 6 * 9 * 8
    monkeypatch.setattr("evals.macs.matching_macs", lambda model, costs: 10 * 6 * 9 * 8)
    with pytest.raises(RunError, match="they must agree within 1%"):
        Macs().measure([Subject(small, bundle_of(samples))])
