"""Optimal brain surgeon over units: costs by their definition, moments by loops, and what the ranker makes of them."""

import pytest
import torch
from torch import Tensor

from prune.obs.curvature import curvatures, probe_of
from prune.obs.removal import removal_costs
from prune.rankers.obs import ATTENTION, Obs, columns_of
from prune.repair.rows import readers
from tests.adapters import ADAPTERS, bundle_of
from utils.errors import RunError
from utils.hooks import is_hooked


def layer(seed: int = 0, rows: int = 40, columns: int = 6, outputs: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (N, k), a matrix (k, D), and gradients (N, D)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(rows, columns) @ normal(columns, columns) + 0.7, normal(columns, outputs), normal(rows, outputs)


def moments(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return ones.T @ ones / len(x), g.T @ g / len(g)


def cost_by_definition(x: Tensor, matrix: Tensor, outputs: Tensor, gone: list[int]) -> float:
    """Least mean of `e^T G e` over all weights and biases of the columns that stay."""
    left = [column for column in range(x.shape[1]) if column not in gone]
    read = torch.cat([x[:, left], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    lost = x[:, gone] @ matrix[gone]
    error = lost - read @ torch.linalg.lstsq(read, lost).solution
    return float(torch.einsum("nd,de,ne->n", error, outputs, error).mean())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_costs_are_the_least_errors_of_a_refit(width: int) -> None:
    x, matrix, g = layer()
    inputs, outputs = moments(x, g)
    units = torch.arange(6).view(-1, width)
    found = removal_costs(inputs, outputs, matrix, units, damping=0.0)
    gone: list[int] = []
    highest, before = 0.0, 0.0
    left = list(range(len(units)))
    while left:
        totals = {u: cost_by_definition(x, matrix, outputs, [*gone, *units[u].tolist()]) for u in left}
        cheapest = min(totals, key=lambda u: totals[u])
        highest = max(highest, totals[cheapest] - before)
        assert found[cheapest].item() == pytest.approx(highest, rel=2e-3)
        before, gone = totals[cheapest], [*gone, *units[cheapest].tolist()]
        left.remove(cheapest)


def test_a_unit_that_others_can_stand_in_for_costs_nothing() -> None:
    x, matrix, g = layer(rows=200)
    x[:, 2] = 0.5 * x[:, 0] - 2 * x[:, 4] + 3  # the bias takes the constant
    found = removal_costs(*moments(x, g), matrix, torch.arange(6)[:, None], damping=1e-9)
    assert int(found.argmin()) in (0, 2, 4)
    assert found.min() < 1e-6 * found.max()


def test_gradients_that_never_point_somewhere_make_its_outputs_free() -> None:
    x, matrix, g = layer()
    g[:, 1:] = 0
    matrix[3, 0] = 0  # column 3 only feeds outputs that nobody reads
    found = removal_costs(*moments(x, g), matrix, torch.arange(6)[:, None], damping=0.0)
    assert found[3] == pytest.approx(0, abs=1e-6 * found.max().item())


@pytest.mark.parametrize("inputs", [torch.zeros(4, 4), torch.eye(4)])
def test_dead_inputs_and_no_gradients_cost_nothing_and_stay_finite(inputs: Tensor) -> None:
    matrix, outputs = torch.ones(3, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    found = removal_costs(inputs.double(), outputs, matrix, torch.arange(3)[:, None], damping=0.01)
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_many_units_go_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix, g = layer(rows=300, columns=24)
    every = removal_costs(*moments(x, g), matrix, torch.arange(24)[:, None], damping=0.01)
    monkeypatch.setattr("prune.obs.removal.MOST_STEPS", 8)
    some = removal_costs(*moments(x, g), matrix, torch.arange(24)[:, None], damping=0.01)
    assert len(some.unique()) <= 8
    assert torch.corrcoef(torch.stack([every.log(), some.log()]))[0, 1] > 0.8


@pytest.mark.parametrize("name", ["toy_images", "bert", "llama", "deit"])
def test_moments_are_those_of_a_loop(name: str) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples, batches=1)
    found = curvatures(model, data, seed=0)
    mask, count = samples.get("attention_mask"), len(next(iter(samples.values())))
    for consumer, reader in readers(model, "test").items():
        read: list[Tensor] = []
        handle = reader.module.register_forward_pre_hook(lambda m, args, read=read: read.append(args[0].detach()))
        with torch.no_grad():
            model.logits(samples)
        handle.remove()
        total, rows = torch.zeros_like(found[consumer].inputs), 0
        flat = read[0].reshape(count, -1, read[0].shape[-1])
        for sample, tokens in enumerate(flat):
            for position, token in enumerate(tokens):
                if mask is None or mask[sample, position]:
                    one = torch.cat([token.double(), torch.ones(1, dtype=torch.float64)])
                    total += torch.outer(one, one)
                    rows += 1
        torch.testing.assert_close(found[consumer].inputs, total / rows, rtol=1e-4, atol=1e-5)
        assert found[consumer].rows == pytest.approx(rows / len(flat))


def test_gradients_are_those_of_the_divergence() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples, batches=1)
    name, reader = list(readers(model, "test").items())[-1]
    weight = reader.module.weight
    total = torch.zeros(reader.outputs, reader.outputs, dtype=torch.float64)
    draws = 400
    for seed in range(draws):
        total += curvatures(model, data, seed)[name].outputs / draws
    # the Fisher information of the logits, pushed back through the network by its Jacobian
    kept: list[Tensor] = []
    handle = reader.module.register_forward_hook(lambda m, a, out: kept.append(out) or out)
    logits = model.logits(samples)
    handle.remove()
    shares = logits.detach().softmax(-1).double()
    jacobian = torch.stack([torch.autograd.grad(one.sum(), kept[0], retain_graph=True)[0].double() for one in logits.T])
    # (C, B, T, D)
    fisher = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
    wanted = torch.einsum("cbtd,bce,ebtf->df", jacobian, fisher, jacobian) / jacobian[0, ..., 0].numel()
    assert (total - wanted).norm() < 0.15 * wanted.norm()
    assert weight.grad is None


def test_the_probe_of_a_task_without_distributions_weighs_all_logits_alike() -> None:
    class Distances:
        """No distributions."""

    logits = torch.randn(4, 3, requires_grad=True)
    scalar = probe_of(Distances(), logits, {}, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(scalar, logits)
    assert gradient.abs().tolist() == torch.ones(4, 3).tolist()


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_is_ranked_and_left_as_it_was(name: str) -> None:
    model, samples = ADAPTERS[name]()
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    scores = Obs(seed=1).rank(model, bundle_of(samples)).only()
    assert scores.keys() == {group.name for group in model.unit_groups()}
    assert all(scores[group.name].shape == (group.count,) for group in model.unit_groups())
    assert all(bool((values >= 0).all()) for values in scores.values())
    assert any(float(values.max()) > 0 for values in scores.values())
    assert not is_hooked(model.network)
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())


def test_no_label_is_looked_at_and_a_seed_gives_the_same_bits() -> None:
    model, samples = ADAPTERS["toy_images"]()
    other = {**samples, "labels": (samples["labels"] + 1) % 3}
    first, second = (Obs().rank(model, bundle_of(s)).only() for s in (samples, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = Obs(seed=5).rank(model, bundle_of(samples)).only()
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_heads_are_scored_by_all_their_columns() -> None:
    model, _ = ADAPTERS["toy_images"]()
    group = next(g for g in model.unit_groups() if g.pairwise_features)
    reader = readers(model, "test")[group.consumer.module]
    assert torch.equal(columns_of(reader, group).sort(dim=1).values, group.consumer.index.sort(dim=1).values)
    assert ATTENTION > 1


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_rows_than_columns_leave_the_order_of_double_precision(damping: float) -> None:
    x, matrix, g = layer(rows=20, columns=64, outputs=8)
    inputs, outputs = moments(x, g)
    single = removal_costs(inputs, outputs, matrix, torch.arange(64)[:, None], damping)
    # a second column that is nothing makes units wide, and wide ones are computed in float64
    wide, columns = torch.cat([matrix, torch.zeros_like(matrix)]), torch.arange(128).view(2, 64).T
    double = removal_costs(widened(inputs), outputs, wide, columns, 2 * damping)  # the mean of its diagonal is half
    assert torch.isfinite(single).all() and (single >= 0).all()
    both = torch.stack([single, double]).argsort(dim=1).argsort(dim=1).double()
    assert torch.corrcoef(both)[0, 1] > 0.95, (single, double)


def widened(inputs: Tensor) -> Tensor:
    """Second moments with as many columns again that are never anything."""
    k = len(inputs) - 1
    wide = torch.zeros(2 * k + 1, 2 * k + 1, dtype=inputs.dtype)
    places = torch.tensor([*range(k), 2 * k])
    wide[places[:, None], places] = inputs
    return wide


def test_weights_that_are_nan_are_refused_by_name() -> None:
    model, samples = ADAPTERS["toy_images"]()
    consumer = model.unit_groups()[0].consumer.module
    with torch.no_grad():
        model.network.get_parameter(f"{consumer}.weight")[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"scores of .* \(obs\): \d+ of \d+ are NaN or infinite"):
        Obs().rank(model, bundle_of(samples))
