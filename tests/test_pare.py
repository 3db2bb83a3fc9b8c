"""The recipe: how a ratio is split between units and tokens, and what comes of it on small models."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from data.base import DataBundle
from main import run
from models.base import PrunableModel
from models.cost import cost_model
from models.merging import Reduction
from models.token_cost import token_costs
from prune.base import Scores
from prune.gates import undisturbed
from prune.rankers.kwon import Kwon
from prune.rankers.obs import Obs
from prune.rankers.pare import Pare, careful
from prune.ranking import ranked
from prune.rewriting import applied, refuse_unreachable
from prune.split import trials
from prune.split.curves import promised, splits
from prune.split.trials import ASIDE, Parts, answers, losses, tried
from prune.structural import TEACHER
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from utils.errors import InputError, Unreachable
from utils.storage import Store

POINTS = [(0.1, 0.01), (0.3, 0.09), (0.5, 0.36)]


def test_a_curve_goes_through_its_points_by_its_root() -> None:
    assert promised(POINTS, 0) == 0 and promised([], 0.1) == float("inf")
    for ratio, value in POINTS:
        assert promised(POINTS, ratio) == pytest.approx(value)
    assert promised(POINTS, 0.05) == pytest.approx(0.05**2)  # roots 0 and 0.1
    assert promised(POINTS, 0.2) == pytest.approx(0.2**2)  # roots 0.1 and 0.3
    assert promised(POINTS, 0.7) == pytest.approx(0.9**2), "straight on from 0.3 and 0.6"


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.45, 0.63])
def test_the_split_is_the_best_of_a_fine_grid(ratio: float) -> None:
    units, tokens = [(0.1, 0.02), (0.25, 0.2), (0.45, 1.5)], [(0.1, 0.001), (0.3, 0.03), (0.6, 0.5)]
    found, *_ = splits(units, tokens, ratio)

    def total(share: float) -> float:
        rest = 1 - (1 - ratio) / (1 - share)
        if rest > tokens[-1][0]:
            return float("inf")
        return promised(units, share) + promised(tokens, rest)

    best = min(total(ratio * n / 5000) for n in range(5001))
    assert 0 <= found <= ratio and total(found) <= 1.15 * best + 1e-4


def test_two_kinds_must_be_clearly_better_than_one() -> None:
    points = [(0.2, 0.04), (0.4, 0.16), (0.6, 0.36)]
    nearly = [(at, 0.05 * value) for at, value in points]
    assert splits(points, nearly, 0.5)[0] == 0, "a little of the other kind would promise 5% less"
    assert 0 < splits(points, points, 0.5)[0] < 0.5


def test_units_take_over_where_tokens_can_give_no_more_and_stay_away_where_they_hurt() -> None:
    free, dear = [(0.5, 1e-9)], [(0.1, 5.0), (0.5, 9.0)]
    assert splits(dear, free, 0.4)[0] == 0
    assert splits(free, dear, 0.4)[0] == 0.4
    assert splits(dear, [], 0.4)[0] == 0.4
    within, *_ = splits(dear, [(0.2, 1e-9)], 0.4)
    assert 1 - (1 - 0.4) / (1 - within) == pytest.approx(0.2, abs=0.02)


def small(name: str = "toy_images", samples: int = 60) -> tuple[PrunableModel, DataBundle]:
    model, batch = ADAPTERS[name]()
    generator = torch.Generator().manual_seed(0)
    more = {
        "inputs": torch.randn(samples, *batch["inputs"].shape[1:], generator=generator),
        "labels": torch.randint(3, (samples,), generator=generator),
    }
    return model, bundle_of(more, batches=4)


def test_trials_judge_on_samples_that_nothing_was_fitted_to() -> None:
    _, data = small(samples=150)
    parts = Parts.of(data)
    fitted, judged = (torch.cat([b["inputs"] for b in batches]).flatten(1) for batches in (parts.fitted, parts.judged))
    assert len(fitted) == 96 and 0 < len(judged) <= 96
    assert not any(bool((fitted == row).all(1).any()) for row in judged)
    few = Parts.of(small(samples=20)[1])
    assert few.fitted == few.judged


def test_divergence_is_the_mean_over_samples() -> None:
    model, data = small()
    other, total_macs = model.copy(), cost_model(model, data.example).total("macs")
    tokens = token_costs(model, data.example)
    other.reduce_tokens(careful(0.45, tokens).reduction(tokens, total_macs))
    batches = list(data.calibration)
    total, count = 0.0, 0
    with torch.no_grad(), undisturbed(model.network), undisturbed(other.network):
        for batch in batches:
            for row in range(len(batch["inputs"])):
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                wanted, given = (m.logits(one).log_softmax(-1) for m in (model, other))
                total += float((wanted.exp() * (wanted - given)).sum())
                count += 1
    dense = answers(model, batches)
    found = losses(dense, other, data, batches)
    assert float(found.mean()) == pytest.approx(total / count, rel=5e-3)
    assert float(losses(dense, model, data, batches).abs().max()) == pytest.approx(0, abs=1e-6)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses(dense, other, data, batches, order), found, rtol=1e-4, atol=1e-7)
    first = losses(dense, other, data, batches, order, most=0.0)
    assert first[order[:ASIDE]].isfinite().all() and first[order[ASIDE:]].isinf().all()


def test_the_best_way_is_that_of_a_full_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small(samples=150)
    batches, looked = list(data.calibration), []
    dense, plain = answers(model, batches), trials._answer
    scores = Obs().rank(model, data)

    def trial(way: int, ratio: float) -> PrunableModel:
        if ratio > 0.4 and way == 0:
            raise Unreachable("too much")
        costs = cost_model(model, data.example)
        method = Obs(ratio=round(ratio * (1 + 0.3 * ((way + (ratio > 0.25)) % 3)), 6))
        return cut(model, method.plan(model, scores, costs))

    ways = [partial(trial, way) for way in range(3)]
    monkeypatch.setattr(trials, "_answer", lambda m, batch, portions: looked.append(1) or plain(m, batch, portions))
    found = tried(dense, data, batches, ways, (0.2, 0.3, 0.45), "tried")
    seen, looked[:] = len(looked), []
    for ratio, lost, way in found:
        whole = {n: float(losses(dense, ways[n](ratio), data, batches).mean()) for n in range(3) if ratio < 0.4 or n}
        assert way == min(whole, key=lambda n: whole[n]) and lost == pytest.approx(whole[way], rel=1e-5)
    assert [at for at, *_ in found] == [0.2, 0.3, 0.45] and len({way for *_, way in found}) > 1
    assert seen < 0.9 * len(looked), "ways that have lost more are not followed to their end"
    assert tried(dense, data, batches, ways[:1], (0.2, 0.45, 0.5), "tried")[-1][0] == 0.2


def test_only_a_ratio_that_cannot_be_had_ends_a_curve() -> None:
    model, data = small()
    batches = list(data.calibration)

    def wrong(ratio: float) -> PrunableModel:
        raise InputError("its weights can't be repaired")

    with pytest.raises(InputError, match="can't be repaired"):
        tried(answers(model, batches), data, batches, [wrong], (0.2,), "tried")


@pytest.mark.parametrize("name", ["toy_images", "deit", "bert", "llama", "resnet_basic"])
@pytest.mark.parametrize("tokens", [True, False])
def test_it_meets_the_budget_on_every_kind_of_model(name: str, tokens: bool, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    ratio = 0.1 if name == "resnet_basic" else 0.4  # most of its channels are no units
    data, method = bundle_of(samples), Pare(ratio=ratio, tokens=tokens)
    costs = cost_model(model, data.example)
    ranking = ranked(method, model, data, Store(tmp_path))
    plan = method.plan(model, ranking.scores, costs)
    done = applied(method, model, plan, data, Store(tmp_path))
    left = cost_model(done.model, data.example).total("macs")
    assert left <= (1 - ratio) * costs.total("macs") + 1
    assert left == pytest.approx((1 - plan.ratio_reached) * costs.total("macs"), rel=1e-6)
    assert torch.isfinite(done.model.logits(samples)).all()
    if not tokens or costs.tokens is None:
        assert plan.tokens is None


def test_it_shares_the_ranking_of_obs_and_a_sweep_takes_the_curves_once(tmp_path: Path) -> None:
    model, data = small()
    store = Store(tmp_path)
    units = ranked(Obs(), model, data, store)
    first = ranked(Pare(ratio=0.2), model, data, store)
    again = ranked(Pare(ratio=0.5), model, data, store)
    assert not first.hit and again.hit and first.fingerprint == again.fingerprint
    assert all(torch.equal(first.scores.only()[n], units.scores.only()[n]) for n in units.scores.only())
    assert {"units", "tokens"} <= first.scores.facts.keys()
    assert sum("obs" in path.name for path in tmp_path.rglob("*.safetensors")) == 1


def test_the_split_follows_the_curves(tmp_path: Path) -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    good, bad = [[0.1, 1e-9, 0], [0.7, 1e-8, 0]], [[0.1, 5.0, 0], [0.7, 50.0, 0]]

    def plan(units: list[list[float | int]], tokens: list[list[float | int]]):
        return Pare(ratio=0.4).plan(model, Scores(scores.terms, {"units": units, "tokens": tokens}), costs)

    merged, cut = plan(bad, good), plan(good, bad)
    assert merged.keeps_all_units and merged.tokens is not None and merged.tokens.merges
    assert not cut.keeps_all_units and cut.tokens is None
    assert cut.kept.keys() == Obs(ratio=0.4).plan(model, scores, costs).kept.keys()
    both = plan([[0.1, 0.01, 0], [0.7, 1.0, 0]], [[0.1, 0.01, 2], [0.7, 1.0, 2]])
    assert not both.keeps_all_units and both.tokens is not None and 0 < both.details["ratio_of_units"] < 0.4


def test_units_give_no_more_than_is_missing_beside_the_last_block(monkeypatch) -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    found = Scores(scores.terms, {"units": [[0.1, 0.01, 0]], "tokens": [[0.5, 0.01, 0]]})
    monkeypatch.setattr("prune.rankers.pare.splits", lambda units, tokens, ratio: [ratio - 0.01])
    for ratio in (0.4, 0.5, 0.6):  # the last block alone gives a third
        plan = Pare(ratio=ratio).plan(model, found, costs)
        assert isinstance(plan.tokens, Reduction) and plan.tokens.front_only and not plan.keeps_all_units
        assert plan.details["ratio_of_units"] < ratio - 0.02
        assert 0 <= plan.ratio_reached - ratio < 0.02


def test_what_the_last_block_computes_for_no_answer_goes_first(tmp_path: Path) -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    found = Scores(scores.terms, {"units": [[0.1, 5.0, 0]], "tokens": [[0.1, 1e-9, 0], [0.4, 1e-8, 0]]})
    method = Pare(ratio=0.25)
    plan = method.plan(model, found, costs)
    assert plan.tokens == Reduction((0, 0), metric="tokens", importance=0.1, growth=0.1, front_only=True)
    done = applied(method, model, plan, data, Store(tmp_path))
    assert done.path is None, "there is nothing to make up for"
    batch, *_ = data.validation
    torch.testing.assert_close(done.model.logits(batch), model.logits(batch), atol=1e-5, rtol=0)
    assert cost_model(done.model, data.example).total("macs") <= 0.75 * costs.total("macs")


def test_consumers_are_refitted_where_tokens_merge(tmp_path: Path) -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    found = Scores(scores.terms, {"units": [[0.1, 5.0, 0]], "tokens": [[0.1, 1e-9, 0], [0.45, 1e-8, 0]]})
    method = Pare(ratio=0.44)
    plan = method.plan(model, found, costs)
    done = applied(method, model, plan, data, Store(tmp_path))
    assert done.plan.keeps_all_units and done.plan.details["repair"]["refit"] and done.model.reduction == plan.tokens
    batches = list(data.calibration)
    wanted = answers(model, batches)
    lost = [float(losses(wanted, m, data, batches).mean()) for m in (done.model, method.apply(model, plan))]
    assert lost[0] < 0.9 * lost[1]
    plain = applied(replace(method, repair=()), model, plan, data, Store(tmp_path))
    assert torch.equal(answers(plain.model, batches), answers(method.apply(model, plan), batches))


def test_units_stay_where_the_last_block_alone_gives_the_ratio(tmp_path: Path) -> None:
    model, data = small()
    costs = cost_model(model, data.example)
    scores = ranked(Pare(ratio=0.2), model, data, Store(tmp_path)).scores
    least, *_ = scores.facts["tokens"]
    assert least[0] > 0.3 and least[1] == pytest.approx(0, abs=1e-6), "asked was a tenth"
    assert [at for at, *_ in scores.facts["tokens"]] == sorted({at for at, *_ in scores.facts["tokens"]})
    for ratio in (0.05, 0.2, 0.3):
        plan = Pare(ratio=ratio).plan(model, scores, costs)
        assert plan.keeps_all_units and plan.tokens is not None and not plan.tokens.merges


def test_rounds_and_tokens_do_not_go_together() -> None:
    with pytest.raises(InputError, match="prune.steps=2: must be 1, or prune.tokens=false"):
        Pare(steps=2)
    assert Pare(steps=2, tokens=False).steps == 2


def test_the_job_runs_and_loses_less_than_a_random_cut(small_config: Compose, tmp_path: Path) -> None:
    found = {}
    for method in ("pare", "random"):
        settings = (f"prune={method}", "prune.ratio=0.5", "evals=[loss,macs]", "model.training.epochs=8")
        record = run(small_config(*settings), tmp_path / method)
        assert record.pruned is not None and record.dense is not None
        found[method] = record.pruned["loss"].value
        assert record.pruned["macs"].value <= 0.5 * record.dense["macs"].value  # type: ignore[operator]
    assert found["pare"] < found["random"]


def test_curves_are_those_of_the_search_that_they_are_used_for(tmp_path: Path) -> None:
    model, data = small()
    plain = ranked(Pare(ratio=0.3), model, data, Store(tmp_path))
    for other in (Pare(ratio=0.3, round_to=4), Pare(ratio=0.3, min_keep=2), Pare(ratio=0.3, repair=())):
        assert ranked(other, model, data, Store(tmp_path)).fingerprint != plain.fingerprint
    assert ranked(Pare(ratio=0.3, rearrange=True), model, data, Store(tmp_path)).hit, "no curve depends on it"
    units = ranked(Pare(tokens=False), model, data, Store(tmp_path))
    assert ranked(Pare(tokens=False, round_to=4), model, data, Store(tmp_path)).fingerprint == units.fingerprint


def test_gates_are_tuned_to_the_model_halfway_also_where_tokens_merge() -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    curve = [[0.1, 0.01, 2], [0.7, 1.0, 2]]
    found = Scores(scores.terms, {"units": curve, "tokens": curve})
    plan = Pare(ratio=0.5, repair=("gates", "refit")).plan(model, found, costs)
    assert plan.tokens is not None and not plan.keeps_all_units
    share = plan.details["ratio_of_units"]
    alone = Obs(ratio=share, repair=("gates",)).plan(model, scores, costs)
    assert plan.details[TEACHER] == alone.details[TEACHER]
    assert plan.details[TEACHER] != {name: units.tolist() for name, units in plan.kept.items()}
    assert TEACHER not in Pare(ratio=0.5, repair=("refit", "gates")).plan(model, found, costs).details


def test_a_plan_that_keeps_all_units_has_no_teacher_left_in_it(tmp_path: Path) -> None:
    model, data = small()
    costs, scores = cost_model(model, data.example), Obs().rank(model, data)
    method = Pare(ratio=0.0, repair=("gates", "refit"))
    done = applied(method, model, method.plan(model, scores, costs), data, Store(tmp_path))
    assert done.plan.keeps_all_units and TEACHER not in done.plan.details


def test_a_model_that_merges_already_is_refused_before_anything_is_ranked() -> None:
    model, data = small()
    merging = model.copy()
    whole = cost_model(model, data.example)
    tokens = token_costs(model, data.example)
    merging.reduce_tokens(careful(0.4, tokens).reduction(tokens, whole.total("macs")))
    costs = cost_model(merging, data.example)
    refuse_unreachable(Pare(ratio=0.2), model, whole)
    with pytest.raises(InputError, match="prune=pare: tokens of model=.* are merged already; prune.tokens=false"):
        refuse_unreachable(Pare(ratio=0.2), merging, costs)
    for method in (Pare(ratio=0.2, tokens=False), Obs(ratio=0.2, repair=("bias",)), Obs(ratio=0.2)):
        refuse_unreachable(method, merging, costs)


def test_an_allocation_that_does_not_fit_is_refused_also_where_tokens_would_do(tmp_path: Path) -> None:
    model, data = small()
    (tmp_path / "none.json").write_text("no allocation")
    (tmp_path / "other.json").write_text('{"format": 1, "parts": {"x": {"count": 4, "removed": 0.5}}}')
    for name, words in (("none", "is no allocation file"), ("other", "has no curve for")):
        method = Pare(ratio=0.2, allocation=str(tmp_path / f"{name}.json"))
        with pytest.raises(InputError, match=f"prune.allocation=.*{name}.json: {words}"):
            method.check(cost_model(model, data.example))
    with pytest.raises(InputError, match="prune.allocation=sensitivity: must be null under prune.budget=latency"):
        Pare(budget="latency", allocation="sensitivity")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "width"}, "takes prune.budget=macs or params.*; here they are width and 1"),
        ({"round_to": 4}, "here they are macs and 4"),
    ],
)
def test_what_the_two_kind_search_cannot_do_is_refused_before_anything_is_ranked(settings: dict, words: str) -> None:
    model, data = small()
    costs = cost_model(model, data.example)
    Kwon(ratio=0.2).check(costs)
    with pytest.raises(InputError, match=f"prune.search=optin: .*{words}"):
        Kwon(ratio=0.2, **settings).check(costs)
    Kwon(ratio=0.2, search="greedy", **settings).check(costs)
