"""Methods that drop tokens: schedules for a ratio, calibration, plans, what a run leaves, and bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base import DataBundle, TensorBatches
from evals.base import Subject
from evals.macs import Macs
from evals.token_pictures import kept_patches, patch_grid
from main import run
from models.base import Batch, PrunableModel
from models.cost import cost_model
from models.keeping import Keeping
from models.keeping_flow import flow_of, watched_tokens
from models.token_use import token_use
from models.toy_encoder import ReducingBlock
from models.vit import vit
from prune.base import Plan, Scores
from prune.rankers.fisher import Fisher
from prune.rewriting import Applied, applied
from prune.steps import Steps
from prune.tokens.ats import Ats
from prune.tokens.attention_threshold import AttentionThreshold
from prune.tokens.calibration import largest_keep
from prune.tokens.evit import Evit
from prune.tokens.method import TokenMethod
from prune.tokens.random_k import RandomK
from prune.tokens.threshold_l2 import NormAbove, ThresholdL2
from prune.tokens.value_attention import ValueAttentionTokens
from tests.adapters import ADAPTERS, batch, bundle_of, encoder, timm_resnet, timm_vit
from tests.conftest import Compose
from tests.test_keeping import logits, patches, toy
from utils.errors import InputError
from utils.storage import Store

METHODS: dict[str, type[TokenMethod]] = {
    "threshold_l2": ThresholdL2, "attention_threshold": AttentionThreshold, "evit": Evit, "ats": Ats,
    "value_attention": ValueAttentionTokens, "random_k": RandomK,
}  # fmt: skip
EVIT = {  # specs: DeiT-S, tokens after blocks 4, 7, 10 and MACs, without and with a fused token
    0.9: ((178, 161, 145), 3_988_126_464, (179, 163, 148), 4_021_873_152),
    0.8: ((158, 127, 102), 3_444_215_040, (159, 129, 105), 3_477_159_936),
    0.7: ((139, 98, 69), 2_996_994_816, (140, 100, 72), 3_029_280_768),
    0.6: ((119, 72, 44), 2_608_431_360, (120, 74, 46), 2_635_293_696),
    0.5: ((99, 50, 26), 2_282_378_496, (100, 52, 28), 2_308_835_328),
}


def bundle(samples: Batch) -> DataBundle:
    """Forty-eight images instead of six, so that quantiles mean something."""
    generator = torch.Generator().manual_seed(4)
    more = {name: torch.cat([tensor] * 8) for name, tensor in samples.items()}
    more["inputs"] = torch.randn(more["inputs"].shape, generator=generator)
    batches = list(TensorBatches(more, 16))
    return replace(bundle_of(samples), calibration=batches, validation=batches)


def done(method: Any, model: PrunableModel, data: DataBundle, folder: Path) -> Applied:
    costs = cost_model(model, data.example)
    method.check(costs)
    return applied(method, model, method.plan(model, Scores({}), costs), data, Store(folder))


@pytest.mark.parametrize("keep", EVIT)
def test_evit_on_deit_s_has_the_published_macs(keep: float) -> None:
    model = vit(name="deit_small_patch16_224")
    costs = cost_model(model, {"inputs": torch.zeros(1, 3, 224, 224)})
    assert costs.dropping is not None and costs.total("macs") == 4_598_882_304
    unfused, macs, fused, fused_macs = EVIT[keep]
    for tokens, expected, how in ((unfused, macs, False), (fused, fused_macs, True)):
        plan = Evit(keep=keep, fused=how).plan(model, Scores({}), costs)
        assert tuple(plan.token_counts[layer][1] for layer in (3, 6, 9)) == tokens
        assert isinstance(plan.tokens, Keeping) and costs.dropping.of(plan.tokens) == expected
        assert plan.ratio_reached == pytest.approx(1 - expected / 4_598_882_304)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3])
def test_a_ratio_is_met_on_the_calibration_data(method: str, ratio: float, tmp_path: Path) -> None:
    model, samples = patches()
    data = bundle(samples)
    found = done(METHODS[method](ratio=ratio, min_k=1), model, data, tmp_path)
    costs = cost_model(model, data.example).dropping
    assert costs is not None and found.plan.ratio_asked == ratio
    if ratio == 0:
        assert torch.equal(logits(found.model, samples), logits(model, samples)) and found.plan.is_identity
        return
    use = token_use(found.model, data.calibration)
    removed = 1 - float(costs.totals(use.counts).double().mean()) / costs.total([17] * 3, [17] * 3)
    assert removed == pytest.approx(found.plan.ratio_reached) and ratio <= removed <= ratio + 0.1
    (measured,) = Macs().measure([Subject(found.model, data)])
    macs = measured["macs"]
    assert macs.value is not None and macs.value >= macs.details["ideal"]["mean"] * (1 - 1e-12)
    if method in ("evit", "value_attention", "random_k"):
        assert macs.value == macs.details["executed"]["mean"] == macs.details["ideal"]["p95"]
    again = done(METHODS[method](ratio=ratio, min_k=1), model, data, tmp_path)
    assert again.hit and again.plan == found.plan


@pytest.mark.parametrize("keep", [0.3, 0.75, (0.9, 0.5, 0.25)])
def test_calibrated_thresholds_keep_their_share(keep: Any, tmp_path: Path) -> None:
    model, samples = toy()
    data = bundle(samples)
    found = done(ThresholdL2(keep=keep, layers=(0, 1, 2)), model, data, tmp_path)
    use, entering = token_use(found.model, data.calibration), 16.0
    for layer, share in enumerate(keep if isinstance(keep, tuple) else (keep,) * 3):
        left = float(use.counts[:, layer, 0].double().mean()) - 1
        assert abs(left - share * entering) < 1
        entering = left
    assert isinstance(found.plan.tokens, Keeping) and isinstance(found.plan.tokens.rule, NormAbove)
    other = batch(1, 8, 8)
    alone = logits(found.model, {"inputs": other["inputs"][:1]})
    assert (logits(found.model, other)[:1] - alone).abs().max() < 1e-5, "no threshold depends on the batch"


def test_scores_without_spread_are_called_uninformative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = toy()
    inner = ReducingBlock.forward
    monkeypatch.setattr(ReducingBlock, "forward", lambda self, x: torch.nn.functional.layer_norm(inner(self, x), (24,)))
    data = bundle(samples)
    found = done(ThresholdL2(keep=0.5, layers=(0, 1, 2)), model, data, tmp_path)
    assert found.plan.details["uninformative"] == [1, 2]
    assert "uninformative: the scores of threshold_l2 do not differ in block 1, 2." in found.plan.details["notes"]
    rows = found.plan.details["kept"]
    assert rows[0]["attention"]["mean"] < 17 and rows[0]["attention"] == rows[2]["attention"], "later ones keep all"
    with pytest.raises(InputError, match=r"at most about 0.*uninformative"):
        done(ThresholdL2(ratio=0.3, layers=(1, 2)), model, data, tmp_path)
    labelled = done(ThresholdL2(keep=0.5, layers=(1,), select="topk"), model, data, tmp_path)
    assert labelled.plan.details["uninformative"] == [1]


def test_fixed_thresholds_hold_for_all_or_one_each(tmp_path: Path) -> None:
    model, samples = toy()
    data = bundle(samples)
    for given, layers in ((6.0, (0, 1)), ([6.0, math.inf], (0, 1)), (-math.inf, None), (math.inf, None)):
        found = done(ThresholdL2(threshold=given, layers=layers), model, data, tmp_path)
        wanted = tuple(given) if isinstance(given, list) else (given,) * len(layers or (0, 1, 2))
        assert found.plan.tokens.rule.thresholds == wanted  # type: ignore[union-attr]
        assert found.plan.ratio_asked == found.plan.ratio_reached
        reloaded = _saved_and_loaded(found.plan, tmp_path)
        assert reloaded == found.plan
    assert done(ThresholdL2(threshold=-math.inf), model, data, tmp_path).plan.ratio_reached == 0
    with watched_tokens(flow_of(found.model)) as flow:
        logits(found.model, samples)
        assert flow.seen is not None and (flow.seen.counts[:, -1, 1] == 2).all(), "CLS and the best one"


def _saved_and_loaded(plan: Plan, folder: Path) -> Plan:
    plan.save(folder / "plan.json")
    return Plan.load(folder / "plan.json")


def test_texts_drop_tokens_within_their_own_length(tmp_path: Path) -> None:
    model, samples = encoder("bert")
    data = bundle_of(samples)
    for method in METHODS.values():
        found = done(method(ratio=0.2), model, data, tmp_path)
        assert found.plan.ratio_reached >= 0.2
        use = token_use(found.model, data.validation)
        assert (use.counts[:, 0, 0] <= use.entered).all() and (use.counts >= 1).all()
        value = Macs().measure([Subject(found.model, data)])[0]["macs"].value
        assert value is not None and 0 < value < cost_model(model, data.example).total("macs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.5, "ratio": 0.2}, "prune.keep=0.5, prune.ratio=0.2: give one of the two"),
        ({"keep": 0.0}, r"keep=0.0 must be in \(0, 1\]"),
        ({"keep": 1.5}, r"must be in \(0, 1\]"),
        ({"keep": (0.5, -1)}, r"must be in \(0, 1\]"),
        ({"min_k": 0}, "min_k=0 must be at least 1"),
        ({"batching": "some"}, "must be one of pad, pack, mask"),
        ({"budget": "params"}, "must be one of macs"),
        ({"threshold": 1.0, "keep": 0.5}, "give one of the three"),
        ({"threshold": "low"}, "must be a number"),
        ({"threshold": math.nan}, "must be a number"),
        ({"threshold": 1.0, "select": "topk"}, "must be null with prune.select=topk"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ThresholdL2(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Evit(min_k=18), "prune.min_k=18: must be at most 17, the tokens of a sample"),
        (Evit(layers=(3,)), r"prune.layers=\[3\]: must ascend without repeats in \[0, 3\)"),
        (Evit(layers=(1, 1)), "must ascend without repeats"),
        (Evit(layers=()), "one at least"),
        (Evit(keep=(0.5, 0.5), layers=(0, 1, 2)), "prune.keep=.* has 2 entries for 3 blocks"),
        (Evit(ratio=0.95), "prune.ratio must be at most 0"),
        (Evit(ratio=0.3, min_k=17), "prune.ratio must be at most 0"),
        (ThresholdL2(threshold=[1.0, 2.0], layers=(0, 1, 2)), "prune.threshold=.* has 2 entries for 3 blocks"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(method: TokenMethod, message: str) -> None:
    model, samples = toy()
    with pytest.raises(InputError, match=message):
        method.check(cost_model(model, {"inputs": samples["inputs"][:1]}))


def test_models_that_cannot_drop_tokens_are_refused_early() -> None:
    model, samples = timm_resnet("resnet18")
    with pytest.raises(InputError, match="prune=evit: tokens of this model can't be dropped: it has no tokens"):
        Evit().check(cost_model(model, {"inputs": samples["inputs"][:1]}))
    averaged, samples = timm_vit("vit_base_patch16_224", patch_size=4, class_token=False, global_pool="avg")
    costs = cost_model(averaged, {"inputs": samples["inputs"][:1]})
    for method in (Evit(), Ats(), ValueAttentionTokens()):
        with pytest.raises(InputError, match="this model has no class token"):
            method.check(costs)
    RandomK(keep=0.5).check(costs)
    answering, samples = ADAPTERS["bert_question_answering"]()
    with pytest.raises(InputError, match="an answer may start at any token"):
        RandomK().check(cost_model(answering, {name: tensor[:1] for name, tensor in samples.items()}))


def test_the_search_for_a_share_stays_below_the_ratio() -> None:
    calls = []

    def removed(keep: float) -> float:
        calls.append(keep)
        return (1 - keep) ** 1.5 * 0.8

    for ratio in (0.05, 0.3, 0.6, 0.79):
        calls.clear()
        found = largest_keep(removed, ratio, 0.5, 1e-4)
        assert found is not None and ratio <= removed(found) <= ratio + 0.02 and len(calls) < 12
    assert largest_keep(removed, 0.9, 0.5, 1e-4) is None and min(calls) <= 1e-4


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.8), (0.0, 1.0)])
def test_steps_share_what_is_removed(shares: tuple[float, float], tmp_path: Path) -> None:
    model, samples = patches()
    data = bundle(samples)
    method = Steps(steps={"units": Fisher(), "tokens": Evit()}, shares=shares, ratio=0.4)
    found = done(method, model, data, tmp_path)
    whole = cost_model(model, data.example).total("macs")
    left = cost_model(found.model, data.example).total("macs")
    assert found.plan.ratio_reached == pytest.approx(1 - left / whole) and found.plan.ratio_reached >= 0.4
    assert found.plan.details["reached"][0] == pytest.approx(0.4 * shares[0], abs=0.02)
    assert found.plan.keeps_all_units == (shares[0] == 0) and isinstance(found.plan.tokens, Keeping)
    assert {g.name: len(g.kept) for g in found.plan.groups} == {g.name: g.count for g in found.model.unit_groups()}
    again = done(method, model, data, tmp_path)
    assert again.hit and torch.equal(logits(again.model, samples), logits(found.model, samples))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (1.0,)}, "must have one entry for each of 2"),
        ({"shares": (0.5, 0.6)}, "must sum to 1"),
        ({"steps": {"units": Fisher(budget="params"), "tokens": Evit()}}, "prune.steps.units: must remove a ratio"),
    ],
)
def test_bad_steps_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Steps(**{"steps": {"units": Fisher(), "tokens": Evit()}, "shares": (0.5, 0.5), **settings})


def test_patches_are_found_back() -> None:
    assert patch_grid(196, 224, 224) == (14, 14) and patch_grid(8, 16, 32) == (2, 4) and patch_grid(15, 8, 8) is None
    left = kept_patches(torch.tensor([[0, 1, 4, -1], [0, 2, 3, -1]]), 1, (2, 2))
    assert left.tolist() == [[[True, False], [False, True]], [[False, True], [True, False]]]


@pytest.mark.parametrize("choice", ["threshold_l2", "evit", "fisher_evit"])
def test_a_run_leaves_tables_and_pictures(choice: str, small_config: Compose, tmp_path: Path) -> None:
    quick = ("evals=[quality,macs]", "data.calibration_batches=1", "save=true")
    record = run(small_config(f"prune={choice}", "prune.ratio=0.2", *quick), tmp_path / "out")
    assert record.status == "ok" and record.plan is not None and not record.plan.is_identity
    assert {"plots/kept_tokens.png", "plots/surviving_patches.png"} <= set(record.plots)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = found["pruned"]["macs"]["kept_tokens"]
    assert len(rows) == 2 and rows[-1]["mlp"]["mean"] < 17
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Tokens per block" in report and "as batched" in report and "surviving_patches.png" in report
    again = small_config("prune=none", f"model.checkpoint={tmp_path / 'out' / 'model'}", *quick[:2])
    loaded = run(again, tmp_path / "again")
    assert loaded.dense["accuracy"].value == record.pruned["accuracy"].value
