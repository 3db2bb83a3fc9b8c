"""Refitting a model that merges tokens: against least squares on tokens that were merged by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models.merging_flow
from models.base import Batch, PrunableModel
from models.checkpoint import load_model, save_model
from models.keeping import Keeping
from models.merging import Matching, Reduction, counts, match, member_means, merge, mergeable, places
from prune.base import Plan
from prune.repair.rebuild import Pair, rebuilt
from prune.repair.repairs import Repair, Repairs, repaired
from prune.repair.solvers import Refit
from prune.surgery import cut
from prune.tokens.threshold_l2 import NormAbove
from tests.adapters import ADAPTERS, bundle_of
from tests.test_merging import MODELS, merging
from utils.errors import InputError
from utils.hooks import hooked
from utils.storage import Store

NAMES = {"toy": ("attention.out", "fc2"), "deit": ("attn.proj", "mlp.fc2")}
SCHEDULES = {
    "mlp": Reduction((3, 0, 4), metric="tokens", importance=0.2),
    "front_only": Reduction((3, 2, 0), growth=0.3, front_only=True),
    "attention": Reduction((0, 3, 4), "attention"),
    "no_merge": Reduction((0, 0, 0), front_only=True),
}


def sixty(name: str) -> tuple[PrunableModel, Batch]:
    model, samples = MODELS[name]()
    drawn = torch.Generator().manual_seed(0)
    return model, {"inputs": torch.randn(60, *samples["inputs"].shape[1:], generator=drawn)}


def planned(model: PrunableModel, reduction: Reduction, share: float = 0.6) -> Plan:
    drawn = torch.Generator().manual_seed(1)
    kept = {
        g.name: torch.randperm(g.count, generator=drawn)[: max(1, round(share * g.count))].sort().values
        for g in model.unit_groups()
    }
    return Plan.of(model, kept, tokens=reduction, token_counts=tuple(counts(reduction, 17, 1)))


@pytest.mark.parametrize("front", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [6, 9, 16])
def test_places_are_where_merging_puts_tokens(front: int, tokens: int) -> None:
    drawn = torch.Generator().manual_seed(front + tokens)
    x = torch.randn(3, tokens, 5, generator=drawn, dtype=torch.float64)
    for r in range(mergeable(tokens, front) + 1):
        matching = match(x, r, front)
        found, size = merge(x, torch.ones(3, tokens, 1, dtype=torch.float64), matching)
        where = places(matching, tokens)
        for sample in range(3):
            for position in range(tokens - r):
                members = [t for t in range(tokens) if int(where[sample, t]) == position]
                assert len(members) == int(size[sample, position])
                mean = sum(x[sample, t] for t in members) / len(members)
                torch.testing.assert_close(found[sample, position], mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(member_means(x, where), found, atol=1e-12, rtol=0)


def seen_by(model: PrunableModel, samples: Batch, consumer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward: what a consumer read and gave, what that is added to, and the members (B, n, T) of its tokens."""
    found: dict[str, Tensor] = {}
    block, _, leaf = consumer.partition(".")[2].partition(".")
    norm = f"blocks.{block}.norm{1 if leaf in ('attention.out', 'attn.proj') else 2}"
    members: list[Tensor] = []
    plain = models.merging_flow.merge

    def watched(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
        before = members[-1] if members else torch.eye(x.shape[1]).expand(len(x), -1, -1)
        members.append(plain(before, size, matching)[0])
        return plain(x, size, matching)

    def at(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found["x"], found["y"] = args[0].clone(), output.clone()
        found["members"] = members[-1] if members else torch.eye(17).expand(len(output), -1, -1)

    def of_stream(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found["residual"] = args[0].clone()

    hooks: Any = [(model.network.get_submodule(norm), of_stream), (model.network.get_submodule(consumer), at)]
    models.merging_flow.merge = watched
    try:
        with torch.no_grad(), hooked(after=hooks):
            model.logits(samples)
    finally:
        models.merging_flow.merge = plain
    asked = found["y"].shape[1]
    return found["x"], found["y"], found["residual"][:, :asked], found["members"][:, :asked]


def slow_refit(name: str, model: PrunableModel, plan: Plan, samples: Batch, ridge: float, follow: float):
    """Consumer by consumer, both models from the start each time, numpy's least squares."""
    student = cut(model, plan)
    for layer in range(3):
        for leaf in NAMES[name]:
            consumer = f"blocks.{layer}.{leaf}"
            _, dense, stream, _ = seen_by(model, samples, consumer)
            x, y, residual, members = seen_by(student, samples, consumer)
            target = members @ dense + follow * (members @ stream - residual)
            x, r = (t.flatten(0, 1).double().numpy() for t in (x, target - y))
            pull = np.sqrt(ridge * np.mean((x**2).sum(axis=0)))
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
            rows = np.concatenate([x, pull * np.eye(x.shape[1])[:-1]])
            delta = np.linalg.lstsq(rows, np.concatenate([r, np.zeros((len(rows) - len(r), r.shape[1]))]))[0]
            module: Any = student.network.get_submodule(consumer)
            module.weight.data += torch.from_numpy(delta[:-1].T).float()
            module.bias.data += torch.from_numpy(delta[-1]).float()
    return student


@pytest.mark.parametrize("follow", [1.0, 0.3])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("name", NAMES)
def test_refit_is_least_squares_on_merged_tokens(name: str, schedule: Reduction, follow: float) -> None:
    model, samples = sixty(name)
    plan = planned(model, schedule)
    slow = slow_refit(name, model, plan, samples, 0.1, follow)
    student = cut(model, plan)
    before = {n: t.clone() for n, t in student.network.state_dict().items()}
    # several streams, which must not see each other's tokens
    batches = [{"inputs": part} for part in samples["inputs"].split([7, 30, 23])]
    everything = {group.name: torch.arange(group.count) for group in model.unit_groups()}
    rebuilt(Pair(model, student, everything, plan.kept, model), batches, Refit(0.1, follow), "refit", None)
    for tensor, wanted in slow.network.state_dict().items():
        found = student.network.state_dict()[tensor]
        assert torch.allclose(found, wanted, atol=2e-3, rtol=2e-3), (tensor, (found - wanted).abs().max())
    changed = f"blocks.1.{NAMES[name][1]}.weight"
    assert (before[changed] - student.network.state_dict()[changed]).abs().max() > 1e-2, "the refit must bite"


def repair(model: PrunableModel, plan: Plan, samples: Batch, path: Path, *steps: Repair) -> PrunableModel:
    return repaired(Repairs(steps), model, plan, bundle_of(samples, batches=3), Store(path))[0]


def test_nothing_of_a_stream_stays_in_the_network(tmp_path: Path) -> None:
    model, samples = sixty("toy")
    plan = planned(model, SCHEDULES["mlp"], share=1.0)
    found = repair(model, plan, samples, tmp_path, "refit")
    flow = found.network.blocks[0].flow  # type: ignore[index,union-attr]
    assert not flow.tracked and flow.source is None and flow.size is None
    with torch.no_grad():
        assert torch.equal(found.logits(samples), found.logits(samples))
    again = repair(model, plan, samples, tmp_path, "refit")
    with torch.no_grad():
        assert torch.equal(again.logits(samples), found.logits(samples)), "the same from storage"


def test_merging_costs_less_after_a_refit(tmp_path: Path) -> None:
    model, samples = sixty("deit")
    plan = planned(model, Reduction((4, 4, 0), front_only=True), share=1.0)
    with torch.no_grad():
        wanted = model.logits(samples)
        lost = [(m.logits(samples) - wanted).square().mean() for m in (
            cut(model, plan), repair(model, plan, samples, tmp_path, "refit"))]  # fmt: skip
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("steps", [("bias",), ("refit",), ("gates",), ("bias", "refit", "gates")])
def test_a_model_that_merges_already_can_be_repaired(steps: tuple[Repair, ...], tmp_path: Path) -> None:
    model, samples = sixty("deit")
    small = merging(model, SCHEDULES["front_only"])
    units = planned(small, SCHEDULES["front_only"])
    units = Plan.of(small, units.kept)
    found = repair(small, units, samples, tmp_path / "a", *steps)
    assert found.reduction == small.reduction == SCHEDULES["front_only"]
    if "bias" not in steps:  # the mean of what goes is taken where it goes
        dense = repair(model, planned(model, SCHEDULES["front_only"]), samples, tmp_path / "b", *steps)
        with torch.no_grad():
            torch.testing.assert_close(found.logits(samples), dense.logits(samples), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        wanted = model.logits(samples)
        lost = [(m.logits(samples) - wanted).square().mean() for m in (cut(small, units), found)]
    assert lost[1] < lost[0]


def test_a_saved_one_gives_the_same_answers(tmp_path: Path) -> None:
    model, samples = sixty("toy")
    found = repair(model, planned(model, SCHEDULES["front_only"]), samples, tmp_path, "refit")
    save_model(found, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded.logits(samples), found.logits(samples))
    assert loaded.reduction == found.reduction == SCHEDULES["front_only"]


def test_dropped_tokens_are_refused(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    blocks = len(model.blocks())
    model.reduce_tokens(Keeping(NormAbove((math.inf,) * blocks, min_k=3), tuple(range(blocks)), blocks, "mlp"))
    with pytest.raises(InputError, match=r"prune.repair=\['refit'\]: tokens of model=.* are dropped on their way"):
        repair(model, Plan.of(model, {}), samples, tmp_path, "refit")
