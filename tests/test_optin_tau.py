"""Token scores against a plain loop, the walk from scores to a schedule, and Tau at run time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import prune.optin.exact
from data.base import DataBundle
from models.base import PrunableModel
from models.cost import cost_model
from models.merging import Reduction
from prune.optin.combine import TOKEN
from prune.optin.exact import exact_losses
from prune.optin.teacher import Settings, compared_points
from prune.optin.tokens import tokens_of, without_positions
from prune.optin.walk import fewest, schedule_of, walked
from prune.rankers.optin import Optin
from prune.rankers.optin_tau import OptinTau
from prune.ranking import ranked
from prune.tokens.costs import cut_costs
from tests.adapters import ADAPTERS, bundle_of
from utils.errors import InputError
from utils.hooks import captured, hooked
from utils.storage import Artifact, Scratch, Store

MERGEABLE = ["toy_images", "toy_tokens", "deit", "deit_distilled", "vit_swiglu", "vit_qk_norm"]


def plain_token_losses(model: PrunableModel, data: DataBundle, temperature: float) -> dict[str, dict[str, Tensor]]:
    """One pass a position, dropped by a hook; Grams position by position."""
    found: dict[str, dict[str, Tensor]] = {"md": {}, "md_final": {}, "kd": {}}
    points, depth, parts = model.feature_points(), len(model.blocks()), len(data.calibration)
    for samples in data.calibration:
        with captured(model.network, points) as dense, captured(model.network, model.blocks()) as outputs:
            wanted = model.logits(samples)
        tokens = outputs[model.blocks()[0]].shape[1]
        for layer, block in enumerate(model.blocks()):
            name = tokens_of(model, layer)
            for term in found.values():
                term.setdefault(name, torch.zeros(tokens))
            for position in range(tokens):
                kept = [t for t in range(tokens) if t != position]

                def drop(module: nn.Module, args: tuple[Tensor, ...], kept: list[int] = kept) -> tuple[Tensor, ...]:
                    return (args[0][:, kept], *args[1:])

                cut = [(model.network.get_submodule(block), drop)]
                with hooked(before=cut), captured(model.network, points) as moved:
                    given = model.logits(samples)
                for point in compared_points(model, layer):
                    term = "md_final" if point in points[depth:] else "md"
                    gap = _mean_gram(moved[point]) - _mean_gram(dense[point])
                    found[term][name][position] += gap.square().sum() / parts
                deviation = data.task.deviation(given, wanted, samples).sum()
                found["kd"][name][position] += temperature**2 * deviation / parts
    return found


def _mean_gram(features: Tensor) -> Tensor:
    if features.ndim == 2:
        features = features[:, None]
    grams = []
    for t in range(features.shape[1]):
        x = normalize(features[:, t].float(), dim=-1)
        grams.append(x @ x.T)
    return torch.stack(grams).mean(dim=0)


@pytest.mark.parametrize("name", MERGEABLE)
def test_token_losses_equal_a_plain_loop(name: str) -> None:
    model, samples = ADAPTERS[name]()
    data, settings = bundle_of(samples, batches=2), Settings()
    with torch.inference_mode():
        expected = plain_token_losses(model, data, settings.temperature)
    actual = exact_losses(model, data, settings, kinds=[TOKEN])
    for term, groups in expected.items():
        for group, values in groups.items():
            found = actual[term][group] if term in actual else torch.zeros_like(values)
            assert torch.allclose(found, values, rtol=1e-3, atol=1e-6), (term, group)
    assert float(actual["md"][tokens_of(model, 0)].max()) > 0


def test_stacks_lack_one_position_each() -> None:
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    stacked = without_positions(x, range(1, 3)).unflatten(0, (2, 2))
    assert torch.equal(stacked[0], x[:, [0, 2, 3]]) and torch.equal(stacked[1], x[:, [0, 1, 3]])


def test_a_killed_token_ranking_goes_on_bit_for_bit(tmp_path: Path) -> None:
    class Killing(Scratch):
        def save(self, artifact: Artifact) -> None:
            super().save(artifact)
            if artifact.facts["done"] == 3:
                raise KeyboardInterrupt

    model, samples = ADAPTERS["deit"]()
    data, kinds = bundle_of(samples, 2), [TOKEN, "head"]
    whole = exact_losses(model, data, Settings(), kinds=kinds)
    with pytest.raises(KeyboardInterrupt):
        exact_losses(model, data, Settings(), Killing(tmp_path / "left"), kinds)
    resumed = exact_losses(model, data, Settings(), Scratch(tmp_path / "left"), kinds)
    assert all(torch.equal(v, resumed[term][g]) for term, groups in whole.items() for g, v in groups.items())


def slow_walk(scores: Tensor, protected: int, least: int, limit: int) -> list[int]:
    """Sets of positions; MACs are the sum of tokens; every entry tried again from the start after each change."""
    layers, tokens = scores.shape
    kept = [set(range(tokens)) for _ in range(layers)]
    entries = sorted(
        ((float(scores[layer, p]), layer, p) for layer in range(1, layers) for p in range(protected, tokens)),
        key=lambda entry: entry[0],
    )
    while sum(map(len, kept)) > limit:
        changed = False
        for _, layer, p in entries:
            trial = [own - {p} if at >= layer else own for at, own in enumerate(kept)]
            sizes = [len(own) for own in trial]
            pairs = all(n - m <= (n - protected) // 2 for n, m in zip(sizes, sizes[1:], strict=False))
            if trial == kept or min(sizes) < least or not pairs:
                continue
            kept, changed = trial, True
            if sum(sizes) <= limit:
                return sizes
        if not changed:
            break
    return [len(own) for own in kept]


@pytest.mark.parametrize("seed", range(8))
def test_walk_equals_a_slow_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, 11, generator=generator)
    for limit in (44, 40, 33, 26, 10):
        counts, met = walked(scores, 1, 3, sum, limit)
        assert counts == slow_walk(scores, 1, 3, limit)
        assert met == (sum(counts) <= limit)
        assert schedule_of(counts).merged == (0, *(a - b for a, b in zip(counts, counts[1:], strict=False)))


def test_fewest_is_what_a_walk_ends_at() -> None:
    for least in (2, 3, 6):
        assert fewest(4, 11, 1, least) == walked(torch.rand(4, 11), 1, least, sum, 0)[0]


def test_the_unreachable_is_refused_before_anything_is_ranked() -> None:
    model, samples = ADAPTERS["toy_images"]()
    costs = cost_model(model, bundle_of(samples, 1).example)
    with pytest.raises(InputError, match="prune.ratio must be at most"):
        OptinTau(ratio=0.8, static_share=0.1).check(costs)


def test_least_important_positions_go_first_and_protected_ones_never() -> None:
    scores = torch.full((3, 6), 9.0)
    scores[:, 0] = -1.0
    scores[2, 4], scores[1, 3] = 1.0, 2.0
    assert walked(scores, 1, 1, sum, 17)[0] == [6, 6, 5]
    assert walked(scores, 1, 1, sum, 15)[0] == [6, 5, 4]


@pytest.mark.parametrize("name", ["toy_images", "deit", "deit_distilled"])
@pytest.mark.parametrize("share", [0.0, 0.225, 1.0])
def test_plan_is_what_runs(name: str, share: float) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples, 1)
    costs, method = cost_model(model, data.example), OptinTau(ratio=0.1, static_share=share, min_tokens=2)
    base = ranked_scores(OptinTau(), model, data)
    plan = method.plan(model, base, costs)
    pruned = method.apply(model, plan)
    dense, left = costs.total("macs"), cost_model(pruned, data.example).total("macs")
    assert left <= 0.9 * dense and plan.ratio_reached == pytest.approx(1 - left / dense, abs=1e-12)
    assert isinstance(plan.tokens, Reduction) and plan.tokens.before == "attention" and plan.tokens.merged[0] == 0
    assert all(attention == mlp for attention, mlp in plan.token_counts)
    assert plan.keeps_all_units == (share == 0) and plan.tokens.merges == (share < 1)
    units_alone = costs.total("macs", {g.name: len(g.kept) for g in plan.groups})
    assert units_alone >= (1 - share * 0.1) * dense - 0.1 * dense and units_alone <= (1 - share * 0.1) * dense
    assert torch.isfinite(pruned.logits(samples)).all()


def ranked_scores(method: Optin, model: PrunableModel, data: DataBundle):  # noqa: ANN201
    """Scores without a cache."""
    base = method.base(model, data)
    if base is None:
        return method.rank(model, data)
    return method.rank_from(ranked_scores(base, model, data), model, data, None)  # type: ignore[arg-type]


def test_costs_of_a_cut_model_without_cutting() -> None:
    model, samples = ADAPTERS["deit"]()
    data = bundle_of(samples, 1)
    costs = cost_model(model, data.example)
    plan = Optin(ratio=0.4).plan(model, Optin().rank(model, data), costs)
    pruned = Optin().apply(model, plan)
    kept = {g.name: len(g.kept) for g in plan.groups}
    assert costs.tokens is not None and cut_costs(costs.tokens, model, kept) == cost_model(pruned, data.example).tokens


def test_units_are_ranked_once_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, store = bundle_of(samples, 1), Store(tmp_path)
    units = ranked(Optin(), model, data, store)
    scored = []
    plain = prune.optin.exact.group_losses
    monkeypatch.setattr(prune.optin.exact, "group_losses", lambda *a: scored.append(1) or plain(*a))  # type: ignore[func-returns-value]
    tau = ranked(OptinTau(), model, data, store)
    assert not scored and not tau.hit and units.path != tau.path
    assert ranked(OptinTau(ratio=0.1, static_share=0.7, min_tokens=3, token_decay=2.0), model, data, store).hit
    for name, values in units.scores.terms["md"].items():
        assert torch.equal(values, tau.scores.terms["md"][name])


@pytest.mark.parametrize(
    ("adapter", "settings", "message"),
    [
        ("bert", {}, "tokens"),
        ("toy_images", {"min_tokens": 99}, "min_tokens=99: the model has 17 tokens"),
        ("toy_images", {"ratio": 0.9, "static_share": 0.1}, "prune.ratio must be at most"),
        ("toy_images", {"budget": "params"}, "budget=params"),
        ("toy_images", {"static_share": 1.5}, "static_share=1.5"),
    ],
)
def test_what_cannot_be_is_refused(adapter: str, settings: dict, message: str) -> None:
    model, samples = ADAPTERS[adapter]()
    data = bundle_of(samples, 1)
    with pytest.raises(InputError, match=message):
        method = OptinTau(**settings)
        costs = cost_model(model, data.example)
        method.check(costs)
        method.plan(model, ranked_scores(method, model, data), costs)


def test_one_sample_and_merged_models_are_refused() -> None:
    model, samples = ADAPTERS["deit"]()
    one = {name: tensor[:1] for name, tensor in samples.items()}
    with pytest.raises(InputError, match="take at least 2"):
        exact_losses(model, replace(bundle_of(samples, 1), calibration=[one]), Settings(), kinds=[TOKEN])
    for reduction in (Reduction((1, 1)), Reduction((0, 0), front_only=True)):
        merged = model.copy()
        merged.reduce_tokens(reduction)
        with pytest.raises(InputError, match="merged already"):
            exact_losses(merged, bundle_of(samples, 1), Settings())
