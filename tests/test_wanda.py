"""Wanda against the published loop, and against the mistakes that are known of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.base import PrunableModel
from prune.weights.masks import grouped_mask
from prune.weights.statistics import Gram, SquaredNorms, tokens_of
from prune.weights.wanda import Wanda, alpha_mask, wanda
from tests.adapters import ADAPTERS, bundle_of
from tests.sparse import applied_to, joined, linear, masks_of, rebatched, same, split, tiny_llama, weights
from tests.test_weight_masks import slow_mask, slow_pattern
from utils.errors import InputError


def published(model: PrunableModel, samples: Tensor, share: float, pattern: tuple[int, int] | None) -> PrunableModel:
    """The published loop on the toy encoder: one sample at a time, two forwards a block, hooks of its own."""
    pruned = model.copy()
    encoder = pruned.network
    seen: list[Tensor] = []
    handle = encoder.get_submodule("blocks.0").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in samples.split(1):
            pruned.logits({"inputs": sample})
    handle.remove()
    for name in pruned.blocks():
        block = encoder.get_submodule(name)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums = {n: torch.zeros(m.in_features) for n, m in linears.items()}

        def add(module: nn.Module, args: tuple[Tensor], sums: dict = sums, linears: dict = linears) -> None:
            name = next(n for n, other in linears.items() if other is module)
            sums[name] += args[0].detach().flatten(0, 1).square().sum(dim=0)

        handles = [module.register_forward_pre_hook(add) for module in linears.values()]
        with torch.no_grad():
            [block(x) for x in seen]
            for handle in handles:
                handle.remove()
            for n, module in linears.items():
                scores = module.weight.abs() * sums[n].sqrt()
                mask = slow_pattern(scores, *pattern) if pattern else slow_mask(scores, share, "row")
                module.weight[mask] = 0
            seen = [block(x) for x in seen]
    return pruned


@pytest.mark.parametrize(("share", "pattern"), [(0.5, None), (0.33, None), (0.5, (2, 4)), (0.25, (1, 4))])
def test_masks_equal_the_published_loop(share: float, pattern: tuple[int, int] | None, tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    text = f"{pattern[0]}:{pattern[1]}" if pattern else "unstructured"
    done = applied_to(Wanda(ratio=share, pattern=text), model, bundle_of(samples), tmp_path)
    assert same(weights(done.model), weights(published(model, samples["inputs"], share, pattern)))
    assert not same(weights(done.model), weights(model))


def test_the_norm_is_neither_squared_nor_compared_over_the_matrix() -> None:
    """Rows in which squaring changes the order, and a second row that a common threshold would empty."""
    weight, norms = torch.tensor([[3.0, 1.0, 1.1, 9.0], [0.3, 0.1, 0.12, 0.9]]), torch.tensor([1.0, 2.0, 2.5, 1.0])
    right = grouped_mask(wanda(weight, norms), 0.5, "row")
    assert right.tolist() == [[False, True, True, False], [False, True, True, False]]
    squared = grouped_mask(wanda(weight, norms.square()), 0.5, "row")
    assert not torch.equal(squared, right)
    assert grouped_mask(wanda(weight, norms), 0.5, "tensor").tolist() == [[False] * 4, [True] * 4]


def test_scores_equal_the_loop_and_are_per_token() -> None:
    x, weight = torch.randn(30, 4), torch.randn(3, 4)
    once, twice = SquaredNorms(), SquaredNorms()
    once.add(x, 1)
    twice.add(x, 1)
    twice.add(x, 1)
    slow = [[abs(float(weight[i, j])) * float((x[:, j] ** 2).sum() / 30) ** 0.5 for j in range(4)] for i in range(3)]
    torch.testing.assert_close(wanda(weight, once.norms()), torch.tensor(slow))
    torch.testing.assert_close(once.norms(), twice.norms())


def test_column_groups_are_the_magnitude_of_each_column(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    done = applied_to(Wanda(ratio=0.4, group="column"), model, bundle_of(samples), tmp_path)
    for name, mask in masks_of(done.model, done.plan).items():
        assert torch.equal(mask, slow_mask(linear(model, name).weight.detach().abs(), 0.4, "column")), name


@pytest.mark.parametrize("name", ["toy_images", "deit", "bert"])
def test_the_batch_size_does_not_matter(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    found = [
        applied_to(Wanda(), model, rebatched(data, split(samples, size)), tmp_path / str(size)) for size in (1, 2, 4, 6)
    ]
    assert all(same(weights(found[0].model), weights(other.model)) for other in found[1:])


@pytest.mark.parametrize("make", [SquaredNorms, Gram])
def test_statistics_of_one_batch_equal_those_of_many(make: type) -> None:
    x = torch.randn(8, 5, 6)
    one, many = make(), make()
    one.add(x.flatten(0, 1), 8)
    for sample in x:
        many.add(sample, 1)
    assert one.tokens == many.tokens == 40
    torch.testing.assert_close(one.norms(), many.norms())
    torch.testing.assert_close(one.norms(), x.flatten(0, 1).square().mean(dim=0).sqrt())


def test_every_batch_counts(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    every, first = (
        applied_to(Wanda(), model, d, tmp_path / str(i))
        for i, d in enumerate((data, rebatched(data, data.calibration[:1])))
    )
    assert not same(weights(every.model), weights(first.model))
    backwards = applied_to(Wanda(), model, rebatched(data, data.calibration[::-1]), tmp_path / "b")
    assert same(weights(every.model), weights(backwards.model))


def test_pads_do_not_count(tmp_path: Path) -> None:
    """More padding at the end changes nothing; counting it would."""
    model, samples = ADAPTERS["bert"]()
    data = bundle_of(samples)
    longer = {
        n: torch.cat([t, torch.zeros(6, 11, dtype=t.dtype)], dim=1) if t.ndim == 2 else t for n, t in samples.items()
    }
    short, long = (
        applied_to(Wanda(), model, rebatched(data, [batch]), tmp_path / str(i))
        for i, batch in enumerate((samples, longer))
    )
    assert same(weights(short.model), weights(long.model))
    found = short.plan.details["matrices"]
    assert {facts["tokens"] for facts in found.values()} == {int(samples["attention_mask"].sum())}
    x = torch.randn(6, 9, 4)
    assert len(tokens_of(x, {})) == 54 and len(tokens_of(x, samples)) == int(samples["attention_mask"].sum())
    assert torch.equal(tokens_of(x.flatten(0, 1), samples), tokens_of(x, samples))


def test_schedules_differ_behind_the_first_block_alone(tmp_path: Path) -> None:
    model, data = tiny_llama()
    found = {
        schedule: applied_to(Wanda(ratio=0.6, schedule=schedule), model, data, tmp_path)
        for schedule in ("block_sequential", "dense", "true_sequential")
    }
    masks = {schedule: masks_of(done.model, done.plan) for schedule, done in found.items()}
    differing = {n.split(".")[2] for n, m in masks["dense"].items() if not torch.equal(m, masks["block_sequential"][n])}
    assert differing and "0" not in differing
    within = {
        n
        for n, m in masks["true_sequential"].items()
        if not torch.equal(m, masks["block_sequential"][n]) and ".0." in n
    }
    assert within and all("q_proj" not in n and "k_proj" not in n and "v_proj" not in n for n in within)
    assert "schedule=dense" in found["dense"].plan.details["notes"][1]


def test_more_than_one_sample_and_length_is_no_limit(tmp_path: Path) -> None:
    """As many samples and as long ones as there are, whatever the model's own context is."""
    model, data = tiny_llama()
    for count, length in ((1, 3), (5, 7)):
        batch = {n: t[:count, :length] if t.ndim == 2 else t[:count] for n, t in joined(data.calibration).items()}
        done = applied_to(Wanda(), model, rebatched(data, [batch]), tmp_path)
        assert {facts["tokens"] for facts in done.plan.details["matrices"].values()} == {count * length}


def slow_alpha(scores: Tensor, alpha: float) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        total, so_far = sum(row), 0.0
        for j in sorted(range(len(row)), key=lambda j: (row[j], j)):
            so_far += row[j]
            if so_far > alpha * total:
                break
            mask[i, j] = True
    return mask


def test_the_alpha_variant_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 64, generator=generator) ** torch.linspace(0.2, 4, 40)[:, None]
    for share in (0.3, 0.5, 0.7):
        mask, alpha = alpha_mask(scores, share)
        assert torch.equal(mask, slow_alpha(scores.double(), alpha))
        assert float(mask.float().mean()) == pytest.approx(share, abs=0.001) and 0 < alpha < 0.8
        assert len(set(mask.sum(dim=1).tolist())) > 10, "rows lose different parts"


def test_the_alpha_variant_beyond_the_published_range() -> None:
    """Equal scores: more than 80% of the sum must go; a row where nothing is small enough keeps all."""
    mask, alpha = alpha_mask(torch.ones(10, 100), 0.9)
    assert float(mask.float().mean()) == pytest.approx(0.9, abs=0.01) and alpha > 0.8
    mask, _ = alpha_mask(torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]]), 0.375)
    assert mask[0].tolist() == [False, True, True, True] and not bool(mask[1].any())
    assert not bool(alpha_mask(torch.rand(3, 4), 0.0)[0].any()) and bool(alpha_mask(torch.rand(3, 4), 1.0)[0].all())


def test_the_alpha_variant_says_how_far_off_it_is(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    done = applied_to(Wanda(ratio=0.5, variant="alpha"), model, bundle_of(samples), tmp_path)
    assert done.plan.ratio_reached == pytest.approx(0.5, abs=0.01)
    far = [f for f in done.plan.details["matrices"].values() if abs(f["off"]) > 0.001]
    assert bool(far) == any("off their ratio" in note for note in done.plan.details["notes"])
    with pytest.raises(InputError, match="prune.variant=alpha: compares within rows; prune.group=tensor"):
        Wanda(variant="alpha", group="tensor")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything(share: float, tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    done = applied_to(Wanda(ratio=share), model, bundle_of(samples), tmp_path)
    assert done.plan.ratio_reached == share and done.plan.is_identity == (share == 0)
    assert same(weights(done.model), weights(model)) == (share == 0)


@pytest.mark.parametrize("allocation", ["global", "owl", "alpha"])
@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_allocations_meet_the_ratio(allocation: str, group: str, tmp_path: Path) -> None:
    model, data = tiny_llama()
    method = Wanda(ratio=0.6, allocation=allocation, group=group, owl_multiple=1.5)  # type: ignore[arg-type]
    done = applied_to(method, model, data, tmp_path)
    shares = [m.zeros / m.count for m in done.plan.matrices]
    one = applied_to(method, model, rebatched(data, split(joined(data.calibration), 1)), tmp_path)
    assert one.plan.matrices == done.plan.matrices, "norms are pooled over tokens, not averaged over batches"
    assert len({round(share, 4) for share in shares}) > 1
    total = sum(m.count for m in done.plan.matrices)
    assert sum(m.zeros for m in done.plan.matrices) == int(0.6 * total + 1e-9), "whatever competes"
    for name, mask in masks_of(done.model, done.plan).items():
        counts = mask.sum(dim=1 if group == "row" else 0).tolist()
        if group != "tensor":  # a matrix's part is spread evenly, what is left over going to the first
            assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True), name


def test_the_same_part_of_every_row_is_rounded_down(tmp_path: Path) -> None:
    """Where all matrices lose the same, rows of 16 and 24 lose floor(0.6 * 16) and floor(0.6 * 24), as published."""
    model, data = tiny_llama()
    done = applied_to(Wanda(ratio=0.6), model, data, tmp_path)
    for name, mask in masks_of(done.model, done.plan).items():
        assert set(mask.sum(dim=1).tolist()) == {int(0.6 * mask.shape[1])}, name
    assert 0.6 - 1 / 16 < done.plan.ratio_reached < 0.6
