"""Masks and allocations against slow loops: exact counts, ties, patterns, and parts that meet the ratio."""

from fractions import Fraction
from itertools import product
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prune.weights import masks
from prune.weights.allocation import alpha, global_counts, met, outlier_share, owl, tail_exponent, whole_counts
from prune.weights.magnitude import WeightMagnitude
from prune.weights.masks import (
    Group,
    Pattern,
    comparators,
    grouped_mask,
    kth_lowest,
    lowest,
    nth_lowest,
    packed,
    pattern_mask,
    pattern_of,
    removed_count,
    unpacked,
)
from prune.weights.sequential import zero_where
from prune.weights.words import word_ranks
from tests.adapters import ADAPTERS, bundle_of
from tests.sparse import applied_to, linear, masks_of
from utils.errors import InputError, RunError


def slow_lowest(values: list[float], count: int) -> list[bool]:
    gone = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    return [i in gone for i in range(len(values))]


def slow_mask(scores: Tensor, share: float, group: Group) -> Tensor:
    if group == "tensor":
        return torch.tensor(slow_lowest(scores.flatten().tolist(), floor(share * scores.numel() + 1e-9))).view_as(
            scores
        )
    if group == "column":
        return slow_mask(scores.T, share, "row").T
    count = floor(share * scores.shape[1] + 1e-9)
    return torch.tensor([slow_lowest(row, count) for row in scores.tolist()])


def slow_pattern(scores: Tensor, zeros: int, of: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], of):
            mask[row, start : start + of] = torch.tensor(slow_lowest(scores[row, start : start + of].tolist(), zeros))
    return mask


def random_scores(tied: bool, rows: int = 7, columns: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if tied:
        return torch.randint(0, 4, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0, 0.04, 0.29, 0.5, 0.57, 0.95, 0.999, 1])
@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_masks_equal_the_loop(group: Group, share: float, tied: bool) -> None:
    scores = random_scores(tied)
    assert torch.equal(grouped_mask(scores, share, group), slow_mask(scores, share, group))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [0, 1, 62, 63, 64, 139, 140])
@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_an_exact_part_is_spread_over_the_groups(group: Group, count: int, tied: bool) -> None:
    """Of 7 x 20 entries exactly so many go; the first groups lose one more than the others."""
    scores = random_scores(tied)
    mask = grouped_mask(scores, Fraction(count, 140), group)
    assert int(mask.sum()) == count
    if group == "tensor":
        assert torch.equal(mask.flatten(), torch.tensor(slow_lowest(scores.flatten().tolist(), count)))
        return
    lines, masks = (t if group == "row" else t.T for t in (scores, mask))
    each, extra = divmod(count, len(lines))
    wanted = [slow_lowest(line, each + (number < extra)) for number, line in enumerate(lines.tolist())]
    assert masks.tolist() == wanted


@pytest.mark.parametrize("size", range(2, 17))
def test_the_network_finds_every_place(size: int) -> None:
    """Zeros and ones are enough to tell a network that sorts from one that does not (the 0-1 principle)."""
    rows = torch.tensor([[float(number >> place & 1) for place in range(size)] for number in range(min(2**size, 4096))])
    rows = torch.cat([rows, torch.rand(50, size, generator=torch.Generator().manual_seed(size))])
    for place in range(1, size + 1):
        assert torch.equal(nth_lowest(rows.T.contiguous(), place), rows.sort(dim=1).values[:, place - 1])


def test_few_comparisons_give_the_second_of_four() -> None:
    """Seven minima and maxima; a whole sorting network of four has ten."""
    assert sum(smaller + larger for *_, smaller, larger in comparators(4, 1)) == 7


def test_zeros_are_put_without_a_sign() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.tensor([[-1.0, 2.0, float("nan")]], dtype=kind)
        zero_where(weight, torch.tensor([[True, False, True]]))
        assert weight.tolist() == [[0.0, 2.0, 0.0]] and not bool(weight.signbit().any())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16), (7, 32)])
def test_patterns_equal_the_loop(zeros: int, of: int, tied: bool) -> None:
    scores = random_scores(tied, 5, 64)
    mask = pattern_mask(scores, Pattern(zeros, of))
    assert torch.equal(mask, slow_pattern(scores, zeros, of))
    assert bool((mask.view(-1, of).sum(dim=1) == zeros).all())


@pytest.mark.parametrize("of", [2, 4, 8])
def test_every_rank_of_a_short_group(of: int) -> None:
    """All orders and ties of a group, in pieces that end between two groups; infinities are told apart, too."""
    rows = list(product((0.0, 1.0, 2.0), repeat=of)) if of < 8 else random_scores(True, 500, 8).tolist()
    ranks = word_ranks(np.array(rows, dtype=np.float32).flatten(), of).reshape(-1, of)
    wanted = [[sorted(range(of), key=lambda i: (row[i], i)).index(place) for place in range(of)] for row in rows]  # noqa: B023
    assert ranks.tolist() == wanted


@pytest.mark.parametrize("of", [2, 4, 8])
def test_long_rows_go_piece_by_piece(of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(True, 12, 40)
    whole = pattern_mask(scores, Pattern(1, of))
    monkeypatch.setattr(masks, "WORD_CHUNK", 32)
    assert torch.equal(pattern_mask(scores, Pattern(1, of)), whole)
    turned = scores.T.contiguous().T  # the same, lying otherwise in memory
    assert torch.equal(pattern_mask(turned, Pattern(1, of)), whole)
    assert pattern_mask(torch.zeros(0, 8), Pattern(1, of)).shape == (0, 8)
    assert not pattern_mask(torch.tensor([[0.0, -0.0] * 4]), Pattern(1, of))[0, 1], "zeros of both signs are a tie"
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores[-1, -1] = bad  # in the last piece
        with pytest.raises(RunError, match="1 of 480 are NaN or infinite"):
            pattern_mask(scores, Pattern(1, of))


def test_counts_do_not_fall_one_short_in_binary() -> None:
    assert [removed_count(share, 100) for share in (0.29, 0.57, 0.999)] == [29, 57, 99]
    assert floor(0.29 * 100) == 28, "this is what the small addend is for"
    assert removed_count(Fraction(1, 3), 2**24 * 3) == 2**24


def test_a_threshold_alone_would_remove_too_many() -> None:
    """The published rule `score <= sorted[floor(s n)]` removes one more, and every tie."""
    scores = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    published = scores <= scores.flatten().sort().values[2]
    assert int(published.sum()) == 3
    assert grouped_mask(scores, 0.5, "row").tolist() == [[True, True, False, False]]


def test_comparison_groups_differ() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 9.0], [10.0, 20.0, 4.0, 40.0]])
    masks = {group: grouped_mask(scores, 0.5, group) for group in ("tensor", "row", "column")}
    assert masks["row"].tolist() == [[True, True, False, False], [True, False, True, False]]
    assert masks["tensor"].tolist() == [[True, True, True, False], [False, False, True, False]]
    assert masks["column"].tolist() == [[True, True, True, True], [False, False, False, False]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_stop(bad: float) -> None:
    scores = torch.ones(2, 4)
    scores[1, 2] = bad
    with pytest.raises(RunError, match="1 of 8 are NaN or infinite"):
        grouped_mask(scores, 0.5, "row")
    with pytest.raises(RunError, match="1 of 8 are NaN or infinite"):
        pattern_mask(scores, Pattern(2, 4))
    with pytest.raises(RunError, match="NaN or infinite"):
        global_counts([scores], 0.5)


@pytest.mark.parametrize("text", ["2:", ":4", "4:2", "0:4", "4:4", "2/4", "half", "-1:4", "2.0:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="must be unstructured, or n:m"):
        pattern_of(text, 0.5)


def test_a_ratio_that_contradicts_the_pattern_is_refused() -> None:
    with pytest.raises(InputError, match="prune.ratio=0.5: contradicts prune.pattern=1:4.*must be 0.25"):
        WeightMagnitude(pattern="1:4")
    assert WeightMagnitude(pattern="2:6", ratio=1 / 3).chosen == Pattern(2, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4", "group": "row"}, "prune.group=row: must be null"),
        ({"pattern": "2:4", "allocation": "alpha"}, "prune.allocation=alpha: must be uniform with"),
        ({"group": "global", "allocation": "alpha"}, "must be uniform or global with prune.group=global"),
        ({"allocation": "owl"}, "looks at activations"),
        ({"ratio": 1.5}, "ratio=1.5 must be in"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WeightMagnitude(**settings)


def test_inputs_that_the_pattern_does_not_divide_are_refused() -> None:
    model, samples = ADAPTERS["bert"]()
    method = WeightMagnitude(pattern="8:16")
    with pytest.raises(InputError, match="prune.pattern=8:16: .* has 24 inputs, which must be a multiple of 16"):
        applied_to(method, model, bundle_of(samples), Path("nowhere"))


def test_packing_gives_the_mask_back() -> None:
    for shape in ((5, 13), (8, 8), (1, 1)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
        assert packed(mask).numel() == -(-mask.numel() // 8)
        assert torch.equal(unpacked(packed(mask), shape), mask)


def test_one_threshold_over_several_tensors() -> None:
    parts = [random_scores(True), random_scores(False), torch.zeros(3)]
    values = torch.cat([part.flatten() for part in parts]).sort().values
    for count in (1, 3, 50, len(values)):
        assert kth_lowest(parts, count) == float(values[count - 1])


@pytest.mark.parametrize("ratio", [0, 0.1, 0.29, 0.5, 0.9, 1])
def test_global_counts_equal_those_of_one_long_row(ratio: float) -> None:
    parts = [random_scores(True, 3, 5), random_scores(False, 4, 4) * 3, random_scores(True, 2, 9)]
    flat = lowest(torch.cat([part.flatten() for part in parts])[None], removed_count(ratio, 15 + 16 + 18))[0]
    assert global_counts(parts, ratio) == [int(part.sum()) for part in flat.split([15, 16, 18])]


def test_outliers_are_pooled_over_the_block() -> None:
    parts = [torch.tensor([1.0, 1.0, 1.0, 30.0]), torch.tensor([1.0, 2.0])]
    assert outlier_share(parts, 3.0) == pytest.approx(1 / 6)
    assert outlier_share(parts[1:], 3.0) == 0


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.95])
def test_allocations_meet_the_ratio_whatever_the_sizes(ratio: float) -> None:
    sizes, values = [100, 350, 50, 1000], [0.01, 0.3, 0.05, 0.02]
    for shares in (owl(values, sizes, ratio, 0.08), alpha([2.0, 5.0, 3.0, 9.0], sizes, ratio, 0.3)):
        assert sum(n * s for n, s in zip(sizes, shares, strict=True)) == pytest.approx(ratio * sum(sizes))
        assert all(0 <= share <= 0.99 for share in shares) and len(set(shares)) > 1
        assert sum(whole_counts(shares, sizes, ratio)) == removed_count(ratio, sum(sizes))


def test_owl_by_hand() -> None:
    """Equal sizes: density is `d - mean(d) + 1 - s`."""
    found = owl([0.0, 0.1, 0.4], [10, 10, 10], 0.6, 0.08)
    spread = [0.16 * value / 0.4 for value in (0.0, 0.1, 0.4)]
    assert found == pytest.approx([0.6 - d + sum(spread) / 3 for d in spread])
    assert found[0] > found[2], "more outliers, less sparse"


def test_alpha_by_hand() -> None:
    found = alpha([1.0, 2.0, 3.0], [10, 20, 30], 0.5, 0.3)
    q = [0.7, 1.0, 1.3]
    factor = 0.5 * 60 / (10 * 0.7 + 20 * 1.0 + 30 * 1.3)
    assert found == pytest.approx([value * factor for value in q])


def test_equal_blocks_share_equally() -> None:
    for shares in (owl([0.2, 0.2], [3, 5], 0.4, 0.08), alpha([2.0, 2.0], [3, 5], 0.4, 0.3)):
        assert shares == pytest.approx([0.4, 0.4])


def test_what_is_clipped_is_spread_over_the_others() -> None:
    shares = met([1.4, 0.8, 0.8], [10, 10, 20], 0.95)
    assert shares[0] == 0.99 and shares[1] == shares[2] == pytest.approx((0.95 * 40 - 9.9) / 30)
    with pytest.raises(InputError, match="prune.ratio=0.995: must be at most 0.99"):
        met([1.0, 1.0], [1, 1], 0.995)


def test_a_heavier_tail_has_a_smaller_exponent() -> None:
    light, heavy = (torch.diag(torch.arange(1.0, 33.0) ** power) for power in (0.2, 3.0))
    assert tail_exponent(light) > tail_exponent(heavy) > 1
    values = (torch.arange(1.0, 33.0) ** 6)[16:].double()
    assert tail_exponent(heavy) == pytest.approx(1 + 16 / float((values / values[0]).log().sum()), rel=1e-4)


@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_every_linear_of_every_block_loses_its_part(group: Group, tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    done = applied_to(WeightMagnitude(ratio=0.3, group=group), model, bundle_of(samples), tmp_path)
    assert len(done.plan.matrices) == 12
    for name, mask in masks_of(done.model, done.plan).items():
        assert torch.equal(mask, slow_mask(linear(model, name).weight.detach().abs(), 0.3, group)), name


@pytest.mark.parametrize("settings", [{"group": "global"}, {"allocation": "global"}])
def test_global_is_one_threshold_over_the_model(settings: dict, tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    done = applied_to(WeightMagnitude(ratio=0.37, **settings), model, bundle_of(samples), tmp_path)
    masks = masks_of(done.model, done.plan)
    sizes = [mask.numel() for mask in masks.values()]
    every = torch.cat([linear(model, name).weight.detach().abs().flatten() for name in masks])[None]
    wanted = slow_mask(every, 0.37, "tensor")[0].split(sizes)
    assert all(torch.equal(mask.flatten(), want) for mask, want in zip(masks.values(), wanted, strict=True))
    assert len({int(m.zeros * 1000 / m.count) for m in done.plan.matrices}) > 1
