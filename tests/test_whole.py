"""Global pruning: exact counts with ties and floors, score algebra, rows that go and rows that are masked, rounds."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.base import DataBundle
from main import run
from models.base import PrunableModel
from models.checkpoint import load_model, save_model
from models.cost import cost_model
from prune.rankers.fisher import Fisher
from prune.ranking import Ranking
from prune.recovery.finetune import Finetune
from prune.recovery.none import NoRecovery
from prune.rewriting import Applied, applied
from prune.rounds import Outcome, in_rounds, ratios
from prune.surgery import masked
from prune.weights.matrices import linear_of, prunable_matrices
from prune.whole.rows import GlobalRows, row_gradients
from prune.whole.scores import weight_scores
from prune.whole.threshold import lowest_of_all
from prune.whole.weights import GlobalWeights
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from utils.errors import InputError
from utils.storage import Store


class Silent:
    """Watches nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def note(self, model: PrunableModel, data: DataBundle, ranking: Ranking) -> None:
        """Not kept."""

    def note_applied(self, done: Applied) -> None:
        """Not kept."""


def toy(name: str = "deit") -> tuple[PrunableModel, DataBundle]:
    model, samples = ADAPTERS[name]()
    return model, bundle_of(samples)


def pruned_by(method: GlobalWeights, model: PrunableModel, data: DataBundle, store: Path):
    plan = method.plan(model, method.rank(model, data), cost_model(model, data.example))
    return applied(method, model, plan, data, Store(store))


def rounds(method, recovery, model: PrunableModel, data: DataBundle, store: Path) -> Outcome:
    costs = cost_model(model, data.example)
    return in_rounds(method, recovery, model, data, Store(store), costs, 0, Silent())


def slow_lowest(scores: list[Tensor], count: int, floors: list[int]) -> list[list[bool]]:
    """One entry after the other, as the rule says."""
    entries = [(float(v), t, i) for t, part in enumerate(scores) for i, v in enumerate(part.flatten())]
    left, gone = [part.numel() for part in scores], [[False] * part.numel() for part in scores]
    for _, tensor, index in sorted(entries):
        if count and left[tensor] > floors[tensor]:
            gone[tensor][index], left[tensor], count = True, left[tensor] - 1, count - 1
    return gone


@pytest.mark.parametrize("seed", range(6))
def test_counts_ties_and_floors_against_a_loop(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 4, (n,), generator=draw).float() for n in (7, 1, 12, 5)]
    floors = torch.randint(0, 4, (4,), generator=draw).tolist()
    room = sum(max(0, len(s) - f) for s, f in zip(scores, floors, strict=True))
    for count in (0, room // 2, room):
        found = lowest_of_all(scores, count, floors)
        assert [mask.tolist() for mask in found] == slow_lowest(scores, count, floors)
    with pytest.raises(ValueError, match="what the floors leave"):
        lowest_of_all(scores, room + 1, floors)


def test_scores_are_those_of_an_explicit_loop_and_ordered() -> None:
    model, data = toy()
    matrices = prunable_matrices(model)
    found = {s: weight_scores(model, data, matrices, s) for s in ("taylor", "taylor_signed", "fisher")}
    name = matrices[2].name
    weight = linear_of(model.network, name).weight
    signed, absolute, squares = (torch.zeros_like(weight) for _ in range(3))
    for batch in data.calibration:
        loss = data.task.loss(model.logits(batch), batch)
        product = (torch.autograd.grad(loss, weight)[0] * weight).detach()
        signed, absolute, squares = signed + product, absolute + product.abs(), squares + product.square()
    torch.testing.assert_close(found["taylor"][name], absolute)
    torch.testing.assert_close(found["taylor_signed"][name], signed.abs(), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(found["fisher"][name], squares)
    assert all(bool((found["taylor_signed"][m.name] <= found["taylor"][m.name]).all()) for m in matrices)
    assert all(parameter.grad is None for parameter in model.network.parameters())


@pytest.mark.parametrize("score", ["magnitude", "taylor", "fisher", "random"])
def test_exactly_the_asked_number_goes_and_exclusions_are_listed(score: str, tmp_path: Path) -> None:
    model, data = toy()
    done = pruned_by(GlobalWeights(ratio=0.37, score=score), model, data, tmp_path)  # type: ignore[arg-type]
    total = sum(matrix.size for matrix in prunable_matrices(model))
    zeros = sum(int((linear_of(done.model.network, m.name).weight == 0).sum()) for m in prunable_matrices(model))
    assert zeros == sum(row.zeros for row in done.plan.matrices) == round(0.37 * total) and done.model.sparse
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"} <= set(done.plan.details["excluded"])
    assert done.hit is False and (score in ("magnitude", "random") or pruned_by(
        GlobalWeights(ratio=0.5, score=score), model, data, tmp_path).hit)  # type: ignore[arg-type]  # fmt: skip


def test_a_linear_that_would_become_empty_is_held_and_named(tmp_path: Path) -> None:
    model, data = toy()
    weak = prunable_matrices(model)[1]
    with torch.no_grad():
        linear_of(model.network, weak.name).weight.mul_(1e-6)
    held = pruned_by(GlobalWeights(ratio=0.5), model, data, tmp_path)
    assert int((linear_of(held.model.network, weak.name).weight != 0).sum()) == 1
    assert held.plan.details["floored"] == [weak.name] and any("floor" in note for note in held.plan.details["notes"])
    free = pruned_by(GlobalWeights(ratio=0.5, min_keep=0), model, data, tmp_path)
    assert free.plan.details["empty"] == [weak.name] and free.plan.ratio_reached == held.plan.ratio_reached
    dense = pruned_by(GlobalWeights(ratio=0.5, min_density=0.25), model, data, tmp_path)
    assert int((linear_of(dense.model.network, weak.name).weight != 0).sum()) == -(-weak.size // 4)
    with pytest.raises(InputError, match="prune.min_keep=0"):
        pruned_by(GlobalWeights(ratio=1.0), model, data, tmp_path)
    pruned_by(GlobalWeights(ratio=1.0, min_keep=0), model, data, tmp_path)


@pytest.mark.parametrize(
    "how",
    [{}, {"optimizer": "sgd"}, {"average": 0.9}, {"optimizer": "lamb", "average": 0.5, "grad_checkpointing": True}],
)
def test_zeros_stay_through_training_averaging_and_saving(how: dict, tmp_path: Path) -> None:
    model, data = toy()
    done = pruned_by(GlobalWeights(ratio=0.6), model, data, tmp_path / "s")
    names = [matrix.name for matrix in prunable_matrices(model)]
    masks = {name: linear_of(done.model.network, name).weight == 0 for name in names}
    way = Finetune(epochs=2, weight_decay=0.3, learning_rate=0.05, **how)
    trained = way.recover(done.model, model, data, Store(tmp_path / "s"), 0).model
    again = load_model(save_model(trained, tmp_path / "saved"))
    for name in names:
        now = linear_of(trained.network, name).weight
        assert torch.equal(now == 0, masks[name]) and torch.equal(
            linear_of(again.network, name).weight == 0, masks[name]
        )
        assert not torch.equal(now, linear_of(done.model.network, name).weight)


def test_row_gates_are_the_sum_over_weights_and_bias() -> None:
    model, data = toy()
    matrix = next(m for m in prunable_matrices(model) if m.name.endswith("attn.proj"))
    linear, batch = linear_of(model.network, matrix.name), data.calibration[1]
    loss = data.task.loss(model.logits(batch), batch)
    of_weight, of_bias = torch.autograd.grad(loss, [linear.weight, linear.bias])
    with_bias = (of_weight * linear.weight).sum(dim=1) + of_bias * linear.bias
    found = row_gradients(model, data, [matrix])[matrix.name][1]
    torch.testing.assert_close(found, with_bias.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, with_bias.detach() - (of_bias * linear.bias).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["deit", "bert", "llama", "conv"])
@pytest.mark.parametrize("score", ["fisher", "magnitude"])
def test_rows_that_can_go_go_and_others_are_masked_only(name: str, score: str, tmp_path: Path) -> None:
    model, data = toy(name)
    costs = cost_model(model, data.example)
    method = GlobalRows(ratio=0.1, score=score, normalize="mean")  # type: ignore[arg-type]
    plan = method.plan(model, method.rank(model, data), costs)
    done = applied(method, model, plan, data, Store(tmp_path)).model
    assert cost_model(done, data.example).total("macs") <= 0.9 * costs.total("macs")
    alone = replace(method, masked_rows=False)
    assert plan.groups == alone.plan(model, alone.rank(model, data), costs).groups, "masked rows don't serve the budget"
    rows = plan.details.get("masked_rows", {})
    for linear, gone in rows.items():
        assert (
            not linear_of(done.network, linear).weight[gone].any()
            and len(gone) < linear_of(done.network, linear).out_features
        )
    if any(rows.values()):
        assert "masked only" in plan.details["notes"][0] and sum(m.zeros for m in plan.matrices)
    batch = data.calibration[0]
    twin = model.copy()
    with torch.no_grad():
        for linear, gone in rows.items():
            linear_of(twin.network, linear).weight[gone] = 0
            if (bias := linear_of(twin.network, linear).bias) is not None:
                bias[gone] = 0
    with torch.inference_mode(), masked(twin, plan):
        expected = twin.logits(batch)
    torch.testing.assert_close(done.logits(batch).detach(), expected, rtol=1e-4, atol=1e-4)


def test_masked_rows_and_their_biases_stay_through_recovery(tmp_path: Path) -> None:
    model, data = toy()
    done = rounds(GlobalRows(ratio=0.2), Finetune(epochs=2, learning_rate=0.05), model, data, tmp_path)
    rows = {name: gone for name, gone in done.plan.details["masked_rows"].items() if gone}
    assert rows
    for name, gone in rows.items():
        linear = linear_of(done.recovered.model.network, name)
        assert not linear.weight[gone].any() and not linear.bias[gone].any() and linear.bias.any()


def test_schedules() -> None:
    assert ratios(0.6, 3, "linear") == pytest.approx([0.2, 0.4, 0.6])
    assert ratios(0.8, 2, "cubic") == pytest.approx([0.7, 0.8]) and ratios(0.7, 1, "cubic") == [0.7]


@pytest.mark.parametrize("method", [Fisher(ratio=0.4), GlobalRows(ratio=0.3), GlobalWeights(ratio=0.5, score="taylor")])
def test_rounds_reach_the_ratio_of_the_dense_model_and_go_on_bit_for_bit(method, tmp_path: Path) -> None:
    model, data = toy()
    costs, way = cost_model(model, data.example), Finetune(epochs=1, learning_rate=0.01)
    through = rounds(replace(method, steps=3), way, model, data, tmp_path / "a")
    assert [row["round"] for row in through.plan.details["rounds"]] == [1, 2, 3]
    assert len(through.recovered.history) == 6 and through.recovered.facts["epochs"] == 3
    once = rounds(method, way, model, data, tmp_path / "a")
    if isinstance(method, GlobalWeights):
        assert through.plan.ratio_reached == once.plan.ratio_reached
    else:
        left = cost_model(through.recovered.model, data.example).total("macs")
        assert left <= (1 - method.ratio) * costs.total(
            "macs"
        ) and through.plan.ratio_reached == 1 - left / costs.total("macs")
        kept = {group.name: torch.tensor(group.kept) for group in through.plan.groups}
        assert all(torch.equal(through.recovered.model.origin[name], units) for name, units in kept.items())

    class Dies(Finetune):
        calls = 0

        def recover(self, *given):
            Dies.calls += 1
            if Dies.calls == 2:
                raise KeyboardInterrupt
            return way.recover(*given)

    with pytest.raises(KeyboardInterrupt):
        rounds(replace(method, steps=3), Dies(), model, data, tmp_path / "b")
    resumed = rounds(replace(method, steps=3), way, model, data, tmp_path / "b")
    pairs = zip(resumed.recovered.model.network.parameters(), through.recovered.model.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and resumed.plan == through.plan


def test_width_in_rounds_keeps_what_one_round_keeps(tmp_path: Path) -> None:
    model, data = toy("toy_tokens")
    kept = []
    for steps in (1, 2, 3):
        method = Fisher(ratio=0.6, budget="width", steps=steps)
        kept.append([len(g.kept) for g in rounds(method, NoRecovery(), model, data, tmp_path).plan.groups])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("prune", ["global_rows", "global_weights"])
def test_a_run_has_three_columns_seconds_and_pictures(prune: str, small_config: Compose, tmp_path: Path) -> None:
    settings = ("+experiment=digits_recover", f"prune={prune}", "recover.epochs=2", "prune.ratio=0.3", "prune.steps=2")
    record = run(small_config(*settings, "evals=[accuracy,macs]"), tmp_path)
    found = record.to_json()
    assert {"accuracy", "macs"} <= set(
        found["unrecovered"]
    ) and "| dense | pruned | recovered |" in record.to_markdown()
    spent = [row["seconds"] for row in found["recovery"]["history"] if "train_loss" in row]
    assert len(spent) == 4 and all(second > 0 for second in spent)
    assert (found["pruned"]["macs"]["value"] < found["dense"]["macs"]["value"]) == (prune == "global_rows")
    assert all((tmp_path / "plots" / name).is_file() for name in ("weights.png", "weights_by_layer.png"))
