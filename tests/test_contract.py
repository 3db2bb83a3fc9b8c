"""What every adapter owes: a plan means the same by masking and by cutting, and costs what it says."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evals.macs import counted_macs
from models.base import Batch, PrunableModel, Recipe
from models.cost import cost_model
from prune.base import Plan
from prune.gates import gated
from prune.rankers.fisher import Fisher
from prune.rankers.magnitude import Magnitude
from prune.rankers.random import Random
from prune.rankers.taylor import Taylor
from prune.ranking import ranked
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of
from utils.hooks import is_hooked
from utils.storage import Store

RANKERS = [Fisher(), Taylor(), Taylor(variant="signed"), Taylor(variant="abs"), Magnitude(), Random()]
TOLERANCE = 1e-5


@pytest.fixture(params=ADAPTERS.values(), ids=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> Iterator[tuple[PrunableModel, Batch]]:
    yield request.param()


def random_plan(model: PrunableModel, seed: int, keep: float = 0.5) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    kept = {
        g.name: torch.randperm(g.count, generator=generator)[: round(keep * g.count)].sort().values
        for g in model.unit_groups()
    }
    return Plan.of(model, kept)


def plans(model: PrunableModel) -> Iterator[Plan]:
    """Random plans, plans that empty one group, and the plan that empties all."""
    yield from (random_plan(model, seed) for seed in range(4))
    for group in model.unit_groups():
        half = random_plan(model, 9).kept
        yield Plan.of(model, half | {group.name: torch.tensor([], dtype=torch.int64)})
    yield random_plan(model, 0, keep=0.0)


def logits(model: PrunableModel, samples: Batch) -> Tensor:
    with torch.inference_mode():
        return model.logits(samples)


def test_full_plan_is_the_identity(adapter: tuple[PrunableModel, Batch]) -> None:
    model, samples = adapter
    assert torch.equal(logits(cut(model, Plan.of(model, {})), samples), logits(model, samples))


def test_masked_logits_equal_shrunk_logits(adapter: tuple[PrunableModel, Batch]) -> None:
    model, samples = adapter
    dense = logits(model, samples)
    for plan in plans(model):
        with masked(model, plan):
            expected = logits(model, samples)
        actual = logits(cut(model, plan), samples)
        assert (actual - expected).abs().max() <= TOLERANCE
        assert (expected - dense).abs().max() > 100 * TOLERANCE, "the plan must bite, or the test shows nothing"
    assert torch.equal(logits(model, samples), dense)


def test_in_double_precision_they_are_equal_to_1e_12(adapter: tuple[PrunableModel, Batch]) -> None:
    model, samples = adapter
    model.network.double()
    samples = model.place(samples)
    plan = random_plan(model, 5)
    with masked(model, plan):
        expected = logits(model, samples)
    assert (logits(cut(model, plan), samples) - expected).abs().max() <= 1e-12


def test_parameters_and_macs_are_as_predicted(adapter: tuple[PrunableModel, Batch]) -> None:
    model, samples = adapter
    example = {name: tensor[:1] for name, tensor in samples.items()}
    costs = cost_model(model, example)
    for plan in plans(model):
        kept = {group.name: len(group.kept) for group in plan.groups}
        pruned = cut(model, plan)
        assert costs.total("params", kept) == sum(p.numel() for p in pruned.network.parameters())
        assert costs.total("macs", kept) == cost_model(pruned, example).total("macs")
        assert costs.total("macs", kept) == pytest.approx(counted_macs(pruned, example), rel=0.01)


def test_a_pruned_model_can_be_pruned_again(adapter: tuple[PrunableModel, Batch]) -> None:
    model, samples = adapter
    once = cut(model, random_plan(model, 1, keep=0.7))
    plan = random_plan(once, 2, keep=0.6)
    twice = cut(once, plan)
    with masked(once, plan):
        expected = logits(once, samples)
    assert (logits(twice, samples) - expected).abs().max() <= TOLERANCE
    directly = cut(model, Plan.of(model, twice.origin))
    assert torch.equal(logits(directly, samples), logits(twice, samples))


def test_the_input_model_is_untouched_and_the_copy_has_no_hooks(adapter: tuple[PrunableModel, Batch]) -> None:
    model, _ = adapter
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    sizes = {group.name: group.count for group in model.unit_groups()}
    pruned = cut(model, random_plan(model, 3))
    with torch.no_grad():
        for parameter in pruned.network.parameters():
            parameter.add_(1)
    after = model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {group.name: group.count for group in model.unit_groups()} == sizes
    assert not is_hooked(pruned.network) and not is_hooked(model.network)


def test_scores_are_cached_and_the_key_knows_the_layout(adapter: tuple[PrunableModel, Batch], tmp_path: Path) -> None:
    model, samples = adapter
    data, store = bundle_of(samples), Store(tmp_path)
    first, second = (ranked(Fisher(), model, data, store) for _ in range(2))
    assert (first.hit, second.hit) == (False, True)
    assert all(torch.equal(v, second.scores.only()[name]) for name, v in first.scores.only().items())
    pruned = cut(model, random_plan(model, 0))
    assert not ranked(Fisher(), pruned, data, store).hit
    model.recipe = Recipe(model.recipe.builder, {**model.recipe.arguments, "heads": "other"})
    assert not ranked(Fisher(), model, data, store).hit, "weights of the same shape may mean another model"


@pytest.mark.parametrize("ranker", RANKERS, ids=lambda r: r.name)
def test_emptied_models_can_be_ranked(adapter: tuple[PrunableModel, Batch], ranker: Fisher) -> None:
    model, samples = adapter
    for plan in plans(model):
        pruned = cut(model, plan)
        scores = ranker.rank(pruned, bundle_of(samples)).only()
        assert {g.name: (g.count,) for g in pruned.unit_groups()} == {n: tuple(v.shape) for n, v in scores.items()}


def test_copying_a_gated_model_is_refused(adapter: tuple[PrunableModel, Batch]) -> None:
    model, _ = adapter
    gates = {group.name: torch.ones(group.count) for group in model.unit_groups()}
    with gated(model, gates), pytest.raises(RuntimeError, match="hooks"):
        cut(model, Plan.of(model, {}))


@pytest.mark.parametrize("ranker", RANKERS, ids=lambda r: r.name)
def test_ranking_leaves_no_trace(adapter: tuple[PrunableModel, Batch], ranker: Fisher) -> None:
    model, samples = adapter
    first = next(model.network.parameters())
    model.network.train()
    list(model.network.modules())[-1].eval()
    first.requires_grad_(False)
    first.grad = torch.full_like(first, 3.0)
    modes = [module.training for module in model.network.modules()]
    wanted = [p.requires_grad for p in model.network.parameters()]
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    random_before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]

    scores = ranker.rank(model, bundle_of(samples))

    assert not is_hooked(model.network)
    assert [module.training for module in model.network.modules()] == modes
    assert [p.requires_grad for p in model.network.parameters()] == wanted
    assert first.grad is not None and torch.equal(first.grad, torch.full_like(first, 3.0))
    assert all(p.grad is None for p in model.network.parameters() if p is not first)
    assert all(torch.equal(weights[name], t) for name, t in model.network.state_dict().items())
    assert random.getstate() == random_before[0]
    assert np.random.get_state()[1].tolist() == random_before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), random_before[2])
    for group in model.unit_groups():
        assert scores.only()[group.name].shape == (group.count,)
        assert scores.only()[group.name].dtype == torch.float32


@pytest.mark.parametrize("ranker", RANKERS, ids=lambda r: r.name)
def test_scores_are_the_same_twice(adapter: tuple[PrunableModel, Batch], ranker: Fisher) -> None:
    model, samples = adapter
    first, second = (ranker.rank(model, bundle_of(samples)).only() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gates_and_hooks_go_when_the_block_fails(adapter: tuple[PrunableModel, Batch]) -> None:
    model, _ = adapter
    gates = {group.name: torch.zeros(group.count) for group in model.unit_groups()}
    with pytest.raises(KeyError), gated(model, gates):
        raise KeyError
    assert not is_hooked(model.network)
