"""Which tokens rules keep: the maths against obvious loops over one sample at a time."""

import math

import pytest
import torch
from torch import Tensor

from models.gathering import fused, kept_first, mean_of_valid, taken
from prune.tokens.random_k import random_scores
from prune.tokens.selection import above, sampled, share_of, shares_of, spread, threshold_at, top_k


def drawn(seed: int, samples: int = 7, tokens: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (samples, tokens), generator=generator).float()  # many are equal
    eligible = torch.rand(samples, tokens, generator=generator) < 0.7
    eligible[0] = False
    return scores, eligible


def best(scores: list[float], eligible: list[bool], k: int) -> set[int]:
    order = sorted((i for i, e in enumerate(eligible) if e), key=lambda i: (-scores[i], i))
    return set(order[:k])


def indices(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [0, 1, 5, 99])
def test_top_k_takes_the_best_and_of_equals_the_first(seed: int, k: int) -> None:
    scores, eligible = drawn(seed)
    expected = [best(s, e, k) for s, e in zip(scores.tolist(), eligible.tolist(), strict=True)]
    assert indices(top_k(scores, eligible, k)) == expected


@pytest.mark.parametrize("threshold", [-math.inf, 0.0, 4.0, 8.0, math.inf])
@pytest.mark.parametrize("strict", [True, False])
def test_thresholds_keep_what_lies_above_and_the_floor(threshold: float, strict: bool) -> None:
    scores, eligible = drawn(1)
    for least in (1, 3, 40):
        expected = []
        for s, e in zip(scores.tolist(), eligible.tolist(), strict=True):
            over = {i for i, ok in enumerate(e) if ok and (s[i] > threshold if strict else s[i] >= threshold)}
            expected.append(over | best(s, e, least))
        assert indices(above(scores, eligible, threshold, strict, least)) == expected


def test_shares_are_exact() -> None:
    assert share_of(0.1, 30) == 3 and share_of(0.7, 196) == 138 and share_of(1.0, 5) == 5 and share_of(0.3, 0) == 0
    counts = torch.arange(300)
    assert shares_of(0.7, counts).tolist() == [share_of(0.7, n) for n in range(300)]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("strict", [True, False])
def test_a_calibrated_threshold_keeps_its_share(keep: float, strict: bool) -> None:
    scores = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    at = threshold_at(scores, keep, strict)
    kept = int(((scores > at) if strict else (scores >= at)).sum())
    assert kept == share_of(keep, 1001)


def test_spread_tells_rounding_from_information() -> None:
    assert spread(torch.full((50,), 22.63)) == 0
    assert spread(22.63 + 1e-5 * torch.randn(50)) < 1e-4
    assert spread(13 + 0.26 * torch.randn(500)) > 1e-2


def slow_sampling(scores: list[float], k: int) -> set[int]:
    """One sample, as the paper says it, in double precision."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    sums, total = [], 0.0
    for i in order:
        total += scores[i]
        sums.append(total)
    low, high = sums[0], sums[-1]
    sums = [(s - low) / (high - low) for s in sums]
    start = min(s for s in sums if s > 0)
    points = [start + (1 - start) * i / (k - 1) for i in range(k)] if k > 1 else [1.0]
    return {order[min(range(len(sums)), key=lambda j: abs(sums[j] - point))] for point in points}


@pytest.mark.parametrize("k", [1, 2, 5, 12, 40])
def test_sampling_is_what_the_loop_does(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(9, 25, generator=generator) ** 6  # few tokens carry most
    eligible = torch.rand(9, 25, generator=generator) < 0.8
    found = indices(sampled(scores, eligible, torch.full((9, 1), k), k))
    for row, kept in enumerate(found):
        places = eligible[row].nonzero().flatten().tolist()
        expected = {places[i] for i in slow_sampling(scores[row, places].double().tolist(), k)}
        assert kept == expected and len(kept) <= k and kept <= set(places)
    counts = {len(kept) for kept in found}
    assert k < 5 or len(counts) > 1, "the number must differ from sample to sample, or nothing adapts"


def test_sampling_of_degenerate_samples() -> None:
    everything = torch.ones(4, 6, dtype=torch.bool)
    everything[2, 1:] = False
    everything[3] = False
    scores = torch.tensor([[0.0] * 6, [1.0] * 6, [2.0] * 6, [1.0] * 6])
    kept = sampled(scores, everything, torch.full((4, 1), 3), 3).sum(1).tolist()
    assert kept[0] == kept[1] == 3 and kept[2:] == [1, 0]


def test_chances_depend_on_place_block_and_seed_alone() -> None:
    places = torch.arange(50).expand(3, -1)
    first = random_scores(places, 4, 0)
    assert torch.equal(first[0], first[2]) and 0 <= float(first.min()) and float(first.max()) < 1
    assert len(set(first[0].tolist())) == 50
    for other in (random_scores(places, 5, 0), random_scores(places, 4, 1)):
        assert not torch.equal(first, other)
    many = random_scores(torch.arange(20000), 3, 7)
    assert abs(float(many.mean()) - 0.5) < 0.02 and abs(float(many.var()) - 1 / 12) < 0.01


def test_a_fused_token_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [4.0, 8.0]]])
    weights = torch.tensor([[0.0, 0.25, 0.5]])
    assert fused(x, weights, "sum").tolist() == [[[2.5, 4.5]]]
    torch.testing.assert_close(fused(x, weights, "mean"), torch.tensor([[[10 / 3, 6.0]]]))
    assert fused(x, torch.zeros(1, 3), "mean").tolist() == [[[0.0, 0.0]]]


def test_gathering_keeps_the_order_and_pooling_the_valid() -> None:
    x = torch.arange(10.0).view(1, 5, 2)
    keep = torch.tensor([[True, False, True, False, True]])
    assert taken(x, kept_first(keep, 3)).tolist() == [[[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]]
    padded = torch.cat([x, torch.full((1, 2, 2), torch.inf)], dim=1)
    valid = torch.tensor([[True] * 5 + [False] * 2])
    torch.testing.assert_close(mean_of_valid(padded, valid), x.mean(1))
    assert not torch.isfinite(padded.mean(1)).any(), "a plain mean over the padding must differ"
