"""SparseGPT against the published column loop, and against the mistakes that are known of it."""

from math import floor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prune.weights import statistics
from prune.weights.masks import Pattern
from prune.weights.sparsegpt import SparseGPT, inverse_factor, sparsegpt
from prune.weights.statistics import Gram
from prune.weights.wanda import Wanda
from tests.adapters import ADAPTERS, bundle_of
from tests.sparse import applied_to, linear, masks_of, rebatched, same, split, weights
from tests.test_weight_masks import slow_lowest
from utils.errors import InputError, RunError


def published(
    weight: Tensor, gram: Tensor, share: float, pattern: Pattern | None, width: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The published loop over columns, in double precision, with exact counts."""
    w, h = weight.double().clone(), gram.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rows, columns = w.shape
    removed = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if pattern is None:
            saliency = (w[:, start:stop] / u.diagonal()[start:stop]) ** 2
            count = floor(share * rows * stop + 1e-9) - floor(share * rows * start + 1e-9)
            gone = torch.tensor(slow_lowest(saliency.flatten().tolist(), count))
            removed[:, start:stop] = gone.view_as(saliency)
        errors = torch.zeros(rows, stop - start, dtype=torch.float64)
        for j in range(start, stop):
            if pattern is not None and j % pattern.of == 0:
                saliency = (w[:, j : j + pattern.of] / u.diagonal()[j : j + pattern.of]) ** 2
                for i in range(rows):
                    removed[i, j : j + pattern.of] = torch.tensor(slow_lowest(saliency[i].tolist(), pattern.zeros))
            q = torch.where(removed[:, j], 0.0, w[:, j])
            error = (w[:, j] - q) / u[j, j]
            w[:, j:stop] -= error[:, None] * u[j, j:stop]
            w[:, j] = q
            errors[:, j - start] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w, removed


def problem(rows: int = 20, columns: int = 36, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Gram]:
    """A random linear, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    gram = Gram()
    gram.add(torch.randn(tokens, columns, generator=generator) @ mix, 4)
    return torch.randn(rows, columns, generator=generator), gram


@pytest.mark.parametrize("width", [128, 12, 20])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_weights_equal_the_published_loop(share: float, width: int) -> None:
    weight, gram = problem()
    factor = inverse_factor(gram.gram(), 0.01)
    (found,) = sparsegpt([weight], factor, [share], width=width)
    wanted, removed = published(weight, gram.gram(), share, None, width)
    assert torch.equal(found.removed, removed) and int(removed.sum()) == floor(share * weight.numel() + 1e-9)
    torch.testing.assert_close(found.weight, wanted.float(), rtol=1e-4, atol=1e-4)
    assert not bool(found.weight[removed].any())


@pytest.mark.parametrize(("zeros", "of", "width"), [(2, 4, 128), (2, 4, 12), (1, 4, 8), (3, 6, 12), (9, 18, 36)])
def test_patterns_are_chosen_from_updated_weights(zeros: int, of: int, width: int) -> None:
    weight, gram = problem()
    pattern = Pattern(zeros, of)
    (found,) = sparsegpt([weight], inverse_factor(gram.gram(), 0.01), [zeros / of], pattern, width)
    wanted, removed = published(weight, gram.gram(), zeros / of, pattern, width)
    assert torch.equal(found.removed, removed)
    assert bool((found.removed.view(-1, of).sum(dim=1) == zeros).all())
    torch.testing.assert_close(found.weight, wanted.float(), rtol=1e-4, atol=1e-4)


def test_linears_that_share_an_input_are_pruned_each_by_itself() -> None:
    weight, gram = problem(rows=30)
    parts, shares = [weight[:4], 5 * weight[4:20], weight[20:]], [0.5, 0.3, 0.8]
    factor = inverse_factor(gram.gram(), 0.01)
    together = sparsegpt(parts, factor, shares, width=16)
    for part, share, found in zip(parts, shares, together, strict=True):
        (alone,) = sparsegpt([part], factor, [share], width=16)
        assert torch.equal(found.removed, alone.removed)
        torch.testing.assert_close(found.weight, alone.weight, rtol=1e-5, atol=1e-5)


def test_independent_inputs_need_no_update() -> None:
    """With a diagonal Gram matrix only saliency decides, and what stays is as it was."""
    weight, _ = problem()
    h = torch.diag(torch.rand(36, generator=torch.Generator().manual_seed(5)) + 0.1)
    (found,) = sparsegpt([weight], inverse_factor(h, 0.01), [0.5], width=36)
    saliency = weight.double().square() * (h.double().diagonal() + 0.01 * h.double().diagonal().mean())
    assert torch.equal(found.removed.flatten(), torch.tensor(slow_lowest(saliency.flatten().tolist(), 360)))
    torch.testing.assert_close(found.weight, weight.masked_fill(found.removed, 0))
    assert float(found.loss.sum()) == pytest.approx(float(saliency[found.removed].sum()) / 2, rel=1e-4)


def test_the_update_makes_up_for_what_was_removed() -> None:
    weight, gram = problem()
    h = gram.gram()
    (found,) = sparsegpt([weight], inverse_factor(h, 0.01), [0.5])

    def error(new: Tensor) -> float:
        return float(((new - weight) @ h * (new - weight)).sum())

    masked = weight.masked_fill(found.removed, 0)
    assert error(found.weight) < 0.8 * error(masked)


@pytest.mark.parametrize("stripe", [512, 3])
def test_the_gram_matrix_is_that_of_all_tokens(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "STRIPE", stripe)
    x = torch.randn(6, 5, 7)
    gram = Gram()
    for batch in x.split(2):
        gram.add(batch.flatten(0, 1), 2)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(gram.gram(), 2 / 6 * flat.T @ flat)
    torch.testing.assert_close(gram.norms(), flat.square().mean(dim=0).sqrt())
    assert gram.tokens == 30 and gram.samples == 6


def test_dead_inputs_lose_their_weights_and_disturb_nothing() -> None:
    weight, _ = problem()
    x = torch.randn(100, 36)
    x[:, [3, 30]] = 0
    gram = Gram()
    gram.add(x, 1)
    factor = inverse_factor(gram.gram(), 0.01)
    (found,) = sparsegpt([weight], factor, [0.4], width=16)
    wanted, removed = published(weight, gram.gram(), 0.4, None, 16)
    assert factor.dead.nonzero().flatten().tolist() == [3, 30] and not bool(found.weight[:, [3, 30]].any())
    assert torch.equal(found.removed, removed)
    torch.testing.assert_close(found.weight, wanted.float(), rtol=1e-4, atol=1e-4)


def test_damping_escalates_and_is_recorded() -> None:
    """Fewer tokens than features: singular without damping, never silently the identity."""
    x = torch.randn(3, 36)
    gram = Gram()
    gram.add(x, 1)
    factor = inverse_factor(gram.gram(), 0.0)
    assert factor.damping > 0
    h = gram.gram() + factor.damping * gram.gram().diagonal().mean() * torch.eye(36)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ h, torch.eye(36), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(factor.upper, torch.eye(36), atol=0.1)
    negative = torch.diag(torch.cat([torch.ones(35), torch.tensor([-0.4])]))
    assert inverse_factor(negative, 0.01).damping == pytest.approx(1.0)


def test_what_no_damping_helps_is_an_error() -> None:
    hopeless = torch.diag(torch.cat([torch.ones(20), -torch.ones(19)]))
    with pytest.raises(RunError, match="prune.percdamp=0.01: .* is not positive definite with a damping of 10 either"):
        inverse_factor(hopeless, 0.01)
    hopeless[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        inverse_factor(hopeless, 0.01)


def test_more_damping_than_asked_for_is_in_the_report(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    few = {name: tensor[:1] for name, tensor in samples.items()}
    done = applied_to(SparseGPT(percdamp=0.0), model, rebatched(bundle_of(samples), [few]), tmp_path)
    damped = [facts["damping"] for facts in done.plan.details["matrices"].values()]
    assert max(damped) > 0
    assert any("needed more damping than prune.percdamp=0.0" in note for note in done.plan.details["notes"])


@pytest.mark.parametrize("name", ["toy_images", "deit", "bert"])
def test_whole_models(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    done = applied_to(SparseGPT(ratio=0.5, block_size=8), model, data, tmp_path)
    for row in done.plan.matrices:
        assert row.zeros == row.count // 2
    for name, mask in masks_of(done.model, done.plan).items():
        new, old = linear(done.model, name).weight.detach(), linear(model, name).weight.detach()
        assert int(mask.sum()) * 2 == mask.numel() and not torch.equal(new[~mask], old[~mask]), name
    one = applied_to(SparseGPT(ratio=0.5, block_size=8), model, rebatched(data, split(samples, 1)), tmp_path)
    for matrix in done.plan.matrices:
        first, second = (linear(m, matrix.name).weight for m in (done.model, one.model))
        assert torch.equal(first == 0, second == 0), matrix.name
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_it_loses_less_of_the_output_than_masks_alone(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    with torch.no_grad():
        wanted = model.logits(samples)
        errors = [
            float((applied_to(method, model, data, tmp_path).model.logits(samples) - wanted).square().mean())
            for method in (SparseGPT(ratio=0.3), Wanda(ratio=0.3))
        ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "row"}, "prune.group=row: must be null; sparsegpt"),
        ({"pattern": "2:4", "block_size": 10}, "prune.block_size=10: must be a multiple of prune.pattern=2:4's m"),
        ({"percdamp": -1}, "percdamp=-1 must be at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseGPT(**settings)


def test_half_precision_keeps_its_type_and_its_zeros(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    model.network.bfloat16()
    done = applied_to(SparseGPT(pattern="2:4"), model, bundle_of(samples), tmp_path)
    assert done.model.dtype == torch.bfloat16 and not same(weights(done.model), weights(model))
    for mask in masks_of(done.model, done.plan).values():
        assert bool((mask.view(-1, 4).sum(dim=1) >= 2).all())
