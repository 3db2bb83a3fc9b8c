"""Scores against slow, obvious loops, and the algebra they must obey."""

import pytest
import torch

from prune.base import Scores
from prune.gates import gate_gradients, gated
from prune.normalize import normalized
from prune.rankers.fisher import Fisher, fisher
from prune.rankers.magnitude import Magnitude
from prune.rankers.random import Random
from prune.rankers.taylor import Taylor
from tests.adapters import ADAPTERS, bundle_of
from utils.errors import InputError, RunError

FAMILIES = list(ADAPTERS)


def weight_products(name: str) -> tuple[dict[str, list[torch.Tensor]], object, object]:
    """Per consumer weight, w * g of each calibration batch, by plain backward passes."""
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    products: dict[str, list[torch.Tensor]] = {}
    for batch in data.calibration:
        model.network.zero_grad()
        data.task.loss(model.logits(batch), batch).backward()
        for group in model.unit_groups():
            weight = model.network.get_parameter(f"{group.consumer.module}.weight")
            assert weight.grad is not None
            products.setdefault(group.name, []).append(weight.detach() * weight.grad)
    return products, model, data


@pytest.mark.parametrize("name", FAMILIES)
def test_gate_gradient_is_the_sum_over_the_consumers_columns(name: str) -> None:
    products, model, data = weight_products(name)
    gradients = gate_gradients(model, data, "test")  # type: ignore[arg-type]
    for group in model.unit_groups():  # type: ignore[attr-defined]
        for b, product in enumerate(products[group.name]):
            for unit in range(group.count):
                columns = product.index_select(group.consumer.weight_dim, group.consumer.index[unit])
                assert float(gradients[group.name][b, unit]) == pytest.approx(float(columns.sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_first_order_scores_equal_the_loops(name: str) -> None:
    products, model, data = weight_products(name)
    scores = {v: Taylor(variant=v).rank(model, data).only() for v in ("signed", "batch", "abs")}  # type: ignore[arg-type]
    squares = Fisher().rank(model, data).only()  # type: ignore[arg-type]
    for group in model.unit_groups():  # type: ignore[attr-defined]
        for unit in range(group.count):
            columns = [
                p.index_select(group.consumer.weight_dim, group.consumer.index[unit]) for p in products[group.name]
            ]
            sums = torch.stack([c.sum() for c in columns])
            expected = {
                "signed": float(sums.sum().abs()),
                "batch": float(sums.abs().sum()),
                "abs": float(sum(c.abs().sum() for c in columns)),
            }
            for variant, value in expected.items():
                assert float(scores[variant][group.name][unit]) == pytest.approx(value, rel=1e-3, abs=1e-5)
            assert float(squares[group.name][unit]) == pytest.approx(float(sums.square().sum()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_signed_is_at_most_batch_is_at_most_abs(name: str) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    signed, batch, absolute = (Taylor(variant=v).rank(model, data).only() for v in ("signed", "batch", "abs"))
    slack = 1e-5
    for group in signed:
        assert (signed[group] <= batch[group] + slack).all()
        assert (batch[group] <= absolute[group] + slack).all()
    assert any(float((batch[g] - signed[g]).max()) > 1e-3 for g in signed), "batches must cancel somewhere"


def test_fisher_accumulates_per_batch() -> None:
    gradients = torch.tensor([[1.0, -2.0], [-1.0, 3.0]])
    assert fisher(gradients).tolist() == [2.0, 13.0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_equals_the_loop(name: str, norm: str) -> None:
    model, samples = ADAPTERS[name]()
    found = Magnitude(norm=norm).rank(model, bundle_of(samples)).only()  # type: ignore[arg-type]
    parameters = dict(model.network.named_parameters())
    for group in model.unit_groups():
        for unit in range(group.count):
            weights = [
                parameters[s.tensor].detach().index_select(s.dim, s.index[unit]).flatten()
                for s in group.slices
                if s.tensor in parameters
            ]
            order = 1 if norm == "l1" else 2
            assert float(found[group.name][unit]) == pytest.approx(float(torch.cat(weights).norm(order)), rel=1e-5)


def test_random_depends_on_its_seed_alone() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    first, again, other = (Random(seed=s).rank(model, data).only() for s in (0, 0, 1))
    assert all(torch.equal(first[g], again[g]) and not torch.equal(first[g], other[g]) for g in first)


def test_a_gate_of_a_half_halves_what_the_consumer_reads() -> None:
    model, samples = ADAPTERS["toy_images"]()
    group = model.unit_groups()[1]
    with torch.inference_mode():
        with gated(model, {group.name: torch.full((group.count,), 0.5)}):
            gated_logits = model.logits(samples)
        model.network.get_parameter(f"{group.consumer.module}.weight").data.mul_(0.5)
        assert torch.allclose(model.logits(samples), gated_logits, atol=1e-5)


@pytest.mark.parametrize("ranker", [Fisher(), Taylor(), Taylor(variant="abs")], ids=lambda r: r.name)
def test_an_empty_calibration_set_is_refused(ranker: Fisher) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    empty = type(data)(**{**vars(data), "calibration": []})
    with pytest.raises(InputError, match="calibration set is empty"):
        ranker.rank(model, empty)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_their_group(bad: float) -> None:
    with pytest.raises(RunError, match=r"scores of blocks.1.heads \(fisher\): 1 of 3 .* unit 1"):
        Scores({"fisher": {"blocks.0.heads": torch.ones(2), "blocks.1.heads": torch.tensor([1.0, bad, 2.0])}})


def test_normalisations_by_hand() -> None:
    values = {"a": torch.tensor([1.0, 3.0, 2.0, 2.0]), "empty": torch.zeros(0), "zero": torch.zeros(2)}
    expected = {
        "none": [1.0, 3.0, 2.0, 2.0],
        "mean": [0.5, 1.5, 1.0, 1.0],
        "max": [1 / 3, 1.0, 2 / 3, 2 / 3],
        "rank": [0.25, 1.0, 0.625, 0.625],
        "lamp": [1 / 18, 1.0, 4 / 17, 4 / 17],
    }
    for how, wanted in expected.items():
        found = normalized(values, how)  # type: ignore[arg-type]
        assert found["a"].tolist() == pytest.approx(wanted)
        assert len(found["empty"]) == 0
        assert torch.isfinite(found["zero"]).all() and found["zero"][0] == found["zero"][1]
