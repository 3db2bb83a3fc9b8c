"""What the released OPTIN does and the clean mode does not: every defect with both behaviours side by side."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import prune.optin.exact
from models.bert import bert
from models.cost import cost_model
from models.merging import Reduction
from models.vit import vit
from prune.base import Scores
from prune.gates import gated
from prune.optin import compat
from prune.optin.combine import Positions
from prune.optin.compat import Accounting, Rule, nested_counts, released_schedule, released_walk, searched
from prune.optin.exact import exact_losses
from prune.optin.released import released_plan
from prune.optin.teacher import Settings
from prune.rankers.optin import Optin
from prune.rankers.optin_tau import OptinTau
from prune.ranking import ranked
from tests.adapters import ADAPTERS, bundle_of
from tests.test_optin import plain_losses
from tests.test_optin_tau import ranked_scores
from utils.errors import InputError
from utils.hooks import captured
from utils.storage import Store

NEURONS, HEADS, TOKENS = Positions("n", 0, "neuron"), Positions("h", 0, "head"), Positions("t", 0)


def rule(**changed: object) -> Rule:
    """The released combination on the vision path, lambda 1."""
    return replace(Rule("md+kd", 1.0, True), **changed)  # type: ignore[arg-type]


def of(md: list[float], kd: list[float], name: str = "n") -> dict[str, dict[str, Tensor]]:
    return {"md": {name: torch.tensor(md)}, "kd": {name: torch.tensor(kd)}}


def test_1_masks_of_earlier_layers_leak_into_heads() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples, 1)
    clean = exact_losses(model, data, Settings(), kinds=["head"])
    leaked = exact_losses(model, data, Settings(), kinds=["head"], leak=True)
    first, second = model.unit_groups()[0], model.unit_groups()[2]
    assert torch.equal(clean["md"][first.name], leaked["md"][first.name])
    assert not torch.allclose(clean["kd"][second.name], leaked["kd"][second.name], rtol=0.05)
    # as if the last head of the first layer were gone for good, but compared with the dense model
    gates = {g.name: torch.ones(g.count) for g in (first, second)}
    gates[first.name][-1] = gates[second.name][0] = 0
    points, batch = model.feature_points(), data.calibration[0]
    with torch.inference_mode():
        with captured(model.network, points) as dense:
            wanted = model.logits(batch)
        with gated(model, gates), captured(model.network, points) as moved:
            given = model.logits(batch)
    x, y = (torch.nn.functional.normalize(side["norm"], dim=-1).flatten(0, 1) for side in (dense, moved))
    assert float(leaked["md_final"][second.name][0]) == pytest.approx(
        float((x @ x.T - y @ y.T).square().sum()), rel=1e-3
    )
    deviation = 16 * float(data.task.deviation(given, wanted, batch).sum())
    assert float(leaked["kd"][second.name][0]) == pytest.approx(deviation, rel=1e-3)


def test_2_prior_over_indices_in_language_alone() -> None:
    model, samples = ADAPTERS["bert"]()
    found = compat.prior(model.unit_groups())
    heads, neurons = found[model.unit_groups()[0].name], found[model.unit_groups()[1].name]
    assert float(heads[0]) == 10 and float(heads[-1]) == 1 and float(neurons[0]) == 100 and float(neurons[-1]) == 1
    assert torch.allclose(neurons[1:] / neurons[:-1], neurons[1] / neurons[0])
    # with equal raw scores the prior decides: the first indices of both layers stay, not the whole first layer
    for domain, kept_of_last in (("language", True), ("vision", False)):
        data = replace(bundle_of(samples, 1), domain=domain)
        flat = {g.name: torch.ones(g.count) for g in model.unit_groups()}
        facts = ranked_scores(Optin(mode="compat"), model, data).facts
        method, costs = Optin(mode="compat", ratio=0.7, loss="kd"), cost_model(model, data.example)
        plan = method.plan(model, Scores({"md": flat, "kd": flat}, facts), costs)
        first, last = (g.kept for g in plan.groups if g.kind == "neuron")
        assert 0 < len(first) + len(last) < 40
        prefixes = first == tuple(range(len(first))) and last == tuple(range(len(last)))
        assert (prefixes and abs(len(first) - len(last)) <= 1) == kept_of_last


def test_3_heads_are_counted_as_gone_and_run() -> None:
    model, samples = ADAPTERS["deit"]()
    data = replace(bundle_of(samples, 1), domain="vision")
    scores, costs = ranked_scores(Optin(mode="compat"), model, data), cost_model(model, data.example)
    method = Optin(mode="compat", ratio=0.6)
    plan = method.plan(model, scores, costs)
    pruned = method.apply(model, plan)
    heads = [g for g in pruned.unit_groups() if g.kind == "head"]
    assert all(g.count == 4 for g in heads) and sum(plan.details["heads_counted"].values()) < 8
    assert plan.details["heads_applied"] is False
    executed = 1 - cost_model(pruned, data.example).total("macs") / costs.total("macs")
    assert plan.details["executed_ratio"] == pytest.approx(executed) and executed < plan.ratio_reached
    clean = Optin(ratio=0.5)
    cut = clean.apply(model, clean.plan(model, ranked_scores(clean, model, data), costs))
    assert cost_model(cut, data.example).total("macs") <= 0.5 * costs.total("macs")


def test_3_heads_go_in_language() -> None:
    model, samples = ADAPTERS["bert"]()
    data = replace(bundle_of(samples, 1), domain="language")
    method = Optin(mode="compat", ratio=0.6)
    plan = method.plan(model, ranked_scores(method, model, data), cost_model(model, data.example))
    assert plan.details["heads_applied"] and sum(len(g.kept) for g in plan.groups if g.kind == "head") < 8
    assert method.apply(model, plan).logits(samples).isfinite().all()


def test_4_schedule_runs_a_layer_late_and_the_last_step_never() -> None:
    counts = [197, 180, 150, 100]
    assert released_schedule(counts) == (0, 0, 17, 30)


def test_4_executed_and_nominal_macs_stand_side_by_side() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = replace(bundle_of(samples, 1), domain="vision")
    method = OptinTau(mode="compat", ratio=0.4, static_share=0.2)
    scores, costs = ranked_scores(method, model, data), cost_model(model, data.example)
    plan = method.plan(model, scores, costs)
    left = cost_model(method.apply(model, plan), data.example).total("macs")
    assert isinstance(plan.tokens, Reduction) and plan.tokens.before == "mlp"
    assert plan.tokens.merged == released_schedule(plan.details["nominal_tokens"])
    assert plan.details["executed_ratio"] == pytest.approx(1 - left / costs.total("macs"))
    assert plan.details["nominal_macs"] == pytest.approx((1 - plan.ratio_reached) * plan.details["base_macs"])


def test_5_share_is_drawn_and_can_be_pinned() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = replace(bundle_of(samples, 1), domain="vision")
    scores, costs = ranked_scores(OptinTau(mode="compat"), model, data), cost_model(model, data.example)
    shares = [
        OptinTau(mode="compat", ratio=0.3, seed=seed).plan(model, scores, costs).details["static_share"]
        for seed in (0, 0, 57)
    ]
    np.random.seed(57)
    assert shares[0] == shares[1] != shares[2] == np.random.uniform(0.15, 0.30)
    assert (
        OptinTau(mode="compat", ratio=0.3, static_share=0.2).plan(model, scores, costs).details["static_share"] == 0.2
    )
    clean = OptinTau(ratio=0.1).plan(model, ranked_scores(OptinTau(), model, data), costs)
    assert clean.details["static_share"] == 0.225


def test_6_a_power_of_ten_for_every_unit() -> None:
    # log10(500) - log10(2) = 2.4: c = 100; log10(8) - log10(3) = .43: c = 1
    assert compat.combined(of([500.0, 8.0], [2.0, 3.0]), [NEURONS], 2, rule())["n"].tolist() == [700.0, 11.0]
    # truncation is toward zero: log10(3) - log10(2) - log10(100) = -1.8 gives .1
    found = compat.combined(of([3.0], [2.0]), [NEURONS], 2, rule(lambda_=100.0))
    assert found["n"].tolist() == pytest.approx([3.2])


def test_6_what_stands_in_depends_on_order_and_path() -> None:
    terms = of([1.0, 500.0, 1.0, 5.0], [2.0, 2.0, 2.0, 0.0])
    vision = compat.combined(terms, [NEURONS], 2, rule())["n"].tolist()
    language = compat.combined(terms, [NEURONS], 2, rule(vision=False))["n"].tolist()
    assert vision == [3.0, 700.0, 3.0, 5.0] and language == [3.0, 700.0, 201.0, 5.0]
    heads = compat.combined({t: {"h": v["n"]} for t, v in terms.items()}, [HEADS], 2, rule())
    assert heads["h"].tolist() == language
    # neurons come before tokens of a layer and lend them their memory; heads have their own
    both = {"md": {"n": torch.tensor([500.0]), "t": torch.tensor([0.0]), "h": torch.tensor([1.0])},
            "kd": {"n": torch.tensor([2.0]), "t": torch.tensor([0.0]), "h": torch.tensor([2.0])}}  # fmt: skip
    found = compat.combined(both, [TOKENS, NEURONS, HEADS], 2, rule(vision=False))
    assert found["h"].tolist() == [3.0]


def test_7_padding_counts_in_compat_mode() -> None:
    model, samples = ADAPTERS["bert"]()
    data = bundle_of(samples, 1)
    clean, padded = (exact_losses(model, data, Settings(pads=pads)) for pads in (False, True))
    group = model.unit_groups()[1].name
    assert not torch.allclose(clean["md"][group], padded["md"][group], rtol=0.01)
    ranked_padded = ranked_scores(Optin(mode="compat"), model, data)
    assert torch.equal(ranked_padded.terms["md"][group], padded["md"][group])
    expected = plain_losses(model, bundle_of(samples, 1), Settings())  # without pads
    assert torch.allclose(clean["md"][group], expected["md"][group], rtol=1e-3)


def test_7_vision_takes_the_clean_neurons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, store = replace(bundle_of(samples, 1), domain="vision"), Store(tmp_path)
    clean = ranked(Optin(), model, data, store)
    kinds = []
    plain = prune.optin.exact.group_losses
    monkeypatch.setattr(
        prune.optin.exact,
        "group_losses",
        lambda *given: kinds.append(given[3].kind) or plain(*given),  # type: ignore[func-returns-value]
    )
    released = ranked(Optin(mode="compat"), model, data, store)
    assert set(kinds) == {"head"} and not released.hit
    neurons, heads = model.unit_groups()[3].name, model.unit_groups()[2].name
    assert torch.equal(clean.scores.terms["md"][neurons], released.scores.terms["md"][neurons])
    assert not torch.equal(clean.scores.terms["kd"][heads], released.scores.terms["kd"][heads])


def test_8_no_final_feature_point() -> None:
    terms = of([5.0, 6.0], [1.0, 1.0])
    with_final = {**terms, "md_final": {"n": torch.tensor([100.0, 0.0])}}
    assert compat.combined(with_final, [NEURONS], 2, rule())["n"].tolist() == [6.0, 7.0]
    assert compat.combined(terms, [NEURONS], 2, rule())["n"].tolist() == [6.0, 7.0]


def test_9_sums_are_not_divided_by_their_terms() -> None:
    early, late = Positions("a", 0, "neuron"), Positions("b", 2, "neuron")
    terms = {
        "md": {"a": torch.tensor([8.0]), "b": torch.tensor([8.0])},
        "kd": {"a": torch.zeros(1), "b": torch.zeros(1)},
    }
    found = compat.combined(terms, [early, late], 4, rule())
    assert float(found["a"]) == float(found["b"]) == 8.0


def test_9_mean_divides_by_the_gram() -> None:
    found = compat.combined(of([8.0], [0.0]), [NEURONS], 2, rule(grams={"neuron": 4.0}))
    assert found["n"].tolist() == [0.5]


def test_10_a_tenth_is_left_alone_and_as_many_inherit() -> None:
    everything = set(range(20))
    assert nested_counts([set(), {1, 2, 3}, set()], 20) == [20, 17, 17]
    assert nested_counts([set(), {1, 2, 3}, {4, 5}], 20) == [20, 17, 17]
    assert nested_counts([set(), {1}, {1, 2, 3}], 20) == [20, 19, 17]
    assert nested_counts([set(), {1, 2}, {3, 4, 5}], 20) == [20, 18, 15]
    assert nested_counts([set(), everything - {0, 1}, {2}], 20) == [20, 20, 19]


def test_10_decays_of_the_last_layer_hold_for_neurons_and_tokens() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = replace(bundle_of(samples, 1), domain="vision")
    method = OptinTau(mode="compat", ratio=0.3, static_share=0.5, last_neuron_decay=1e-4)
    scores, costs = ranked_scores(method, model, data), cost_model(model, data.example)
    first_gone = method.plan(model, scores, costs).details["nominal_tokens"]
    plain = replace(method, last_neuron_decay=1.0).plan(model, scores, costs).details["nominal_tokens"]
    assert first_gone != plain


def test_11_what_does_not_fit_stays_eligible_and_vision_takes_one_more() -> None:
    model, _ = ADAPTERS["toy_images"]()
    accounting = Accounting.of(model, 16)
    heads, neurons = ([g.name for g in model.unit_groups() if g.kind == kind] for kind in ("head", "neuron"))
    high = {n: torch.full((accounting.counts[n],), 50.0 if n in heads else 1.0) for n in accounting.counts}
    kept = searched(high, accounting, accounting.unit("head") * 2.5, overshoot=False)
    assert sum(len(kept[n]) for n in heads) == 8 and sum(len(kept[n]) for n in neurons) == 0
    low = {n: torch.full((accounting.counts[n],), 1e-6 if n in heads else 1.0) for n in accounting.counts}
    capacity = accounting.unit("head") + 10.5 * accounting.unit("neuron")
    exact, more = (searched(low, accounting, capacity, overshoot) for overshoot in (False, True))
    assert sum(len(exact[n]) for n in neurons) == 10 and sum(len(more[n]) for n in neurons) == 11
    assert sum(len(exact[n]) for n in heads) == 1


def test_11_an_exhausted_walk_stops_and_says_so() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = replace(bundle_of(samples, 1), domain="vision")
    accounting = Accounting.of(model, 16)
    scores = torch.rand(2, 17)
    counts, met = released_walk(scores, accounting, accounting.counts, accounting.total() * 0.95)
    assert not met and len(counts) == 2
    method = OptinTau(mode="compat", ratio=0.97, static_share=0.1)
    plan = method.plan(model, ranked_scores(method, model, data), cost_model(model, data.example))
    assert plan.details["tokens_exhausted"] and any("ran out" in note for note in plan.details["notes"])


def test_15_the_last_layer_counts_twice_with_distances_alone() -> None:
    last = Positions("n", 1, "neuron")
    for loss, final, expected in (("md", True, 10.0), ("md", False, 5.0), ("md+kd", True, 5.0), ("md+kd", False, 0.0)):
        found = compat.combined(of([5.0], [0.0]), [last], 2, rule(loss=loss, vision=False, final={"neuron": final}))
        assert found["n"].tolist() == [expected]
    assert compat.combined(of([5.0], [0.0]), [last], 2, rule(loss="md", final={"neuron": False}))["n"].tolist() == [
        10.0
    ]


def test_envelope_grows_geometrically_over_layers() -> None:
    layers = [Positions(str(i), i) for i in range(3)]
    terms = {"md": {str(i): torch.ones(1) for i in range(3)}, "kd": {str(i): torch.zeros(1) for i in range(3)}}
    found = compat.combined(terms, layers, 3, rule(envelope=100.0))
    assert [float(found[str(i)]) for i in range(3)] == pytest.approx([1.0, 10.0, 100.0])


@pytest.mark.parametrize(
    ("build", "length", "head", "neuron", "base", "ratio", "capacity"),
    [
        ("bert", 39.05, 7.8727e6, 59_980.8, 3.345e9, 0.4, 2.007e9),
        ("deit_tiny_patch16_224", 196, 14.5510e6, 75_264, 1.217e9, 0.0, 1.217e9),
        ("deit_small_patch16_224", 196, 24.1848e6, 150_528, 4.516e9, 0.316, 3.089e9),
        ("deit_small_patch16_224", 196, 24.1848e6, 150_528, 4.516e9, 0.11, 4.019e9),
        ("deit_base_patch16_224", 196, 43.4524e6, 301_056, 17.36e9, 0.0, 17.36e9),
    ],
)  # fmt: skip
def test_worked_numbers(
    build: str, length: float, head: float, neuron: float, base: float, ratio: float, capacity: float
) -> None:
    with torch.device("meta"):
        model = bert(classes=3, settings={"model_type": "bert"}) if build == "bert" else vit(name=build)
    found = Accounting.of(model, length)
    assert found.unit("head") == pytest.approx(head, rel=1e-5)
    assert found.unit("neuron") == pytest.approx(neuron, rel=1e-6)
    assert found.total() == pytest.approx(base, rel=5e-4)
    assert (1 - ratio) * found.total() == pytest.approx(capacity, rel=5e-4)


def test_published_lengths_are_taken_by_task() -> None:
    model, samples = ADAPTERS["bert"]()
    data = replace(bundle_of(samples, 1), domain="language", name="glue-mnli")
    assert Optin(mode="compat").rank(model, data).facts["length"] == 39.05
    mean = float(samples["attention_mask"].sum() / 6)
    other = replace(data, name="glue-wnli")
    assert math.isclose(Optin(mode="compat").rank(model, other).facts["length"], mean, rel_tol=1e-6)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="lambda_c=0"):
        Optin(mode="compat", lambda_c=0.0)
    with pytest.raises(InputError, match="budget=params"):
        Optin(mode="compat", budget="params")
    model, samples = ADAPTERS["resnet_basic"]()
    data = bundle_of(samples, 1)
    scores = ranked_scores(Optin(mode="compat"), model, data)
    with pytest.raises(InputError, match="heads and neurons, not channels"):
        released_plan(model, scores, cost_model(model, data.example), Optin(mode="compat")._released())
