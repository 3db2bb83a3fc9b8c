"""Width of gated MLPs: scores against slow loops, published counts, stock folders, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from main import run
from models.base import Batch, PrunableModel, UnitGroup
from models.checkpoint import how_to_load, save_model
from models.cost import CostModel, cost_model
from models.llama import llama
from prune.base import Plan
from prune.depth.method import Depth
from prune.rankers.fisher import Fisher
from prune.ranking import ranked
from prune.surgery import cut, masked
from prune.width.counts import best_of_all, best_of_each, removed_of, same_fraction
from prune.width.glu import GluWidth
from tests.adapters import ADAPTERS, bundle_of, causal
from tests.conftest import Compose
from tests.test_contract import logits
from utils.errors import InputError, RunError
from utils.hooks import is_hooked
from utils.storage import Store

SCORES = ["peak_to_peak", "l2", "l1", "variance", "wanda", "data_driven", "random", "first"]
FAMILIES = {name: ADAPTERS[name] for name in ("llama", "qwen3", "vit_swiglu", "deit", "bert")}
LLAMA_3_2_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[PrunableModel, Batch]:
    return request.param()


def costs_of(model: PrunableModel, samples: Batch) -> CostModel:
    return cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})


def planned(method: GluWidth, model: PrunableModel, samples: Batch) -> Plan:
    costs = costs_of(model, samples)
    method.check(costs)
    return method.plan(model, method.rank(model, bundle_of(samples)), costs)


def widths(plan: Plan) -> list[int]:
    return [len(group.kept) for group in plan.groups if group.kind == "neuron"]


def rows_of_neuron(model: PrunableModel, group: UnitGroup, neuron: int) -> list[list[float]]:
    """Its rows as plain numbers, found by the names that each family gives its weights."""
    parts = {"up_proj": (), "gate_proj": (), "fc1_g": (), "fc1_x": (), "fc1": (), "intermediate.dense": ()}
    weights = dict(model.network.named_parameters())
    owner = group.name.removesuffix(".neurons") + "."
    named = [n for n in weights if n.startswith(owner) and any(n.endswith(f"{part}.weight") for part in parts)]
    found = []
    for name in named:
        weight = weights[name].detach().double()
        halves = len(weight) // group.count
        found += [weight[half * group.count + neuron].tolist() for half in range(halves)]
    return found


def column_of_neuron(model: PrunableModel, group: UnitGroup, neuron: int) -> list[float]:
    return model.network.get_parameter(f"{group.consumer.module}.weight").detach().double()[:, neuron].tolist()


def given_by_neurons(model: PrunableModel, group: UnitGroup, samples: Batch) -> Tensor:
    """What its reader reads of real tokens, (N, neurons)."""
    seen: list[Tensor] = []
    reader = model.network.get_submodule(group.consumer.module)
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, samples)
    handle.remove()
    mask = samples["attention_mask"].bool() if "attention_mask" in samples else torch.ones(seen[0].shape[:2]).bool()
    return seen[0][mask].double()


def reach(values: list[float]) -> float:
    return max(values) + abs(min(values))


def norm(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def slow_scores(model: PrunableModel, group: UnitGroup, samples: Batch, score: str) -> list[float]:
    rows = [rows_of_neuron(model, group, n) for n in range(group.count)]
    columns = [column_of_neuron(model, group, n) for n in range(group.count)]
    given = given_by_neurons(model, group, samples)
    outputs = [norm(given[:, n].tolist()) for n in range(group.count)]
    largest = [max(reach(each[part]) for each in rows) for part in range(len(rows[0]))]
    widest = max(map(reach, columns))
    rules = {
        "peak_to_peak": lambda n: sum(map(reach, rows[n])),
        "l2": lambda n: sum(map(norm, rows[n])),
        "l1": lambda n: math.prod(sum(map(abs, row)) for row in rows[n]),
        "variance": lambda n: sum(map(spread, rows[n])),
        "wanda": lambda n: outputs[n] * norm(columns[n]),
        "data_driven": lambda n: (
            outputs[n]
            * (sum(reach(row) / top for row, top in zip(rows[n], largest, strict=True)) + reach(columns[n]) / widest)
        ),
    }
    return [rules[score](n) for n in range(group.count)]


@pytest.mark.parametrize("score", SCORES[:6])
def test_scores_are_those_of_slow_loops(family: tuple[PrunableModel, Batch], score: str) -> None:
    model, samples = family
    found = GluWidth(score=score).rank(model, bundle_of(samples)).only()  # type: ignore[arg-type]
    groups = [group for group in model.unit_groups() if group.kind == "neuron"]
    assert found.keys() == {group.name for group in groups}
    for group in groups:
        wanted = torch.tensor(slow_scores(model, group, samples, score), dtype=torch.float64)
        assert torch.allclose(found[group.name].double(), wanted, rtol=1e-4), group.name
    gated = "gate" in str(type(model.network).__name__) or len(rows_of_neuron(model, groups[0], 0)) == 2
    assert gated == (model.name not in ("bert", "deit_tiny_patch16_224"))


@pytest.mark.parametrize("score", ["wanda", "data_driven"])
def test_batches_and_padding_do_not_matter(score: str) -> None:
    model, samples = ADAPTERS["llama"]()
    method = GluWidth(score=score)  # type: ignore[arg-type]
    first = method.rank(model, bundle_of(samples, batches=1)).only()
    pads = {name: torch.nn.functional.pad(tensor, (0, 7)) for name, tensor in samples.items()}
    for other in (bundle_of(samples, batches=6), bundle_of(samples, batches=2), bundle_of(pads, batches=3)):
        found = method.rank(model, other).only()
        assert all(torch.allclose(found[name], first[name], rtol=1e-5) for name in first)


def test_adding_norms_of_batches_would_depend_on_the_batch_size() -> None:
    """The negative control of the test above, on what the reader of the first MLP reads."""
    model, samples = ADAPTERS["llama"]()
    group = next(g for g in model.unit_groups() if g.kind == "neuron")
    given = given_by_neurons(model, group, samples)
    whole, halves = given.norm(dim=0), given[: len(given) // 2].norm(dim=0) + given[len(given) // 2 :].norm(dim=0)
    assert not torch.allclose(whole, halves, rtol=0.1)


def test_masking_is_cutting_and_the_same_fraction_goes_everywhere(family: tuple[PrunableModel, Batch]) -> None:
    model, samples = family
    for score in SCORES:
        plan = planned(GluWidth(score=score, ratio=0.3), model, samples)  # type: ignore[arg-type]
        (count,) = {group.count for group in plan.groups if group.kind == "neuron"}
        assert widths(plan) == [count - math.floor(0.3 * count)] * 2
        assert all(len(g.kept) == g.count for g in plan.groups if g.kind == "head")
        with masked(model, plan):
            expected = logits(model, samples)
        assert (logits(cut(model, plan), samples) - expected).abs().max() <= 1e-5
        assert plan.details["neurons"]["kept"] == sum(widths(plan)) and not plan.is_identity
    assert not is_hooked(model.network)


@pytest.mark.parametrize(("ratio", "width", "parameters"), [(0.2, 6554, 1_074_792_448), (0.4, 4916, 913_770_496)])
def test_published_counts_of_llama_3_2_1b(ratio: float, width: int, parameters: int) -> None:
    with torch.device("meta"):
        model = llama(settings=LLAMA_3_2_1B)
    costs = cost_model(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
    method = GluWidth(score="first", ratio=ratio)
    method.check(costs)
    plan = method.plan(model, method.rank(model, bundle_of({"input_ids": torch.zeros(3, 8)})), costs)
    pruned = cut(model, plan)
    assert costs.total("params") == 1_235_814_400 and widths(plan) == [width] * 16
    assert sum(parameter.numel() for parameter in pruned.network.parameters()) == parameters
    assert plan.details["params_removed"] == pytest.approx(1 - parameters / 1_235_814_400)


def test_published_widths_and_exact_floors() -> None:
    kept = [same_fraction({"a": 8192}, p, 1)["a"] for p in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    assert kept == [7373, 6554, 5735, 4916, 4096, 3277]
    assert (removed_of(0.29, 100), removed_of(0.57, 100), removed_of(0.0, 7)) == (29, 57, 0)
    assert same_fraction({"a": 8192}, 0.2, 64)["a"] == 6528 and same_fraction({"a": 8192}, 0.4, 128)["a"] == 4864
    assert same_fraction({"a": 8192}, 0.0, 64)["a"] == 8192


@pytest.mark.parametrize("kind", ["llama", "llama_plain", "mistral", "qwen2", "qwen3"])
def test_uniform_results_are_stock_folders(kind: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[kind]()
    pruned = cut(model, planned(GluWidth(ratio=0.35), model, samples))
    folder = save_model(pruned, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 13
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(stock(**samples).logits, logits(pruned, samples))
    assert not torch.equal(logits(pruned, samples), logits(model, samples))


def test_the_best_of_all_layers(tmp_path: Path) -> None:
    model, samples = causal("llama", intermediate_size=24)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "layers.0" in name and ("gate_proj" in name or "up_proj" in name):
                weight.mul_(0.3)
    plan = planned(GluWidth(keep_rule="global", ratio=0.25, min_keep=3), model, samples)
    assert sum(widths(plan)) == 36 and widths(plan)[0] < widths(plan)[1] and plan.ratio_reached == 0.25
    even = planned(GluWidth(keep_rule="global", ratio=0.25, normalize="mean"), model, samples)
    assert sum(widths(even)) == 36 and widths(even)[0] > widths(plan)[0]
    aligned = planned(GluWidth(keep_rule="global", ratio=0.25, round_to=8), model, samples)
    assert all(width % 8 == 0 for width in widths(aligned)) and sum(widths(aligned)) <= 36
    pruned = cut(model, plan)
    folder = save_model(pruned, tmp_path / "model")
    assert "one number of neurons for all layers" in how_to_load(folder)
    scores = GluWidth(keep_rule="global").rank(model, bundle_of(samples)).only()
    cutoff = sorted((float(v) for values in scores.values() for v in values), reverse=True)[35]
    kept = [float(scores[g.name][i]) for g in plan.groups if g.kind == "neuron" for i in g.kept]
    assert min(kept) == cutoff


def test_global_counts_are_exact_for_any_ratio() -> None:
    scores = {"a": torch.rand(17, generator=torch.Generator().manual_seed(0)), "b": torch.rand(13)}
    for percent in range(0, 90, 7):
        kept = best_of_all(scores, percent / 100, 1, 1)
        assert sum(map(len, kept.values())) == 30 - percent * 30 // 100


def test_ties_go_to_the_later_neuron_and_indices_ascend() -> None:
    values = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert best_of_each({"a": values}, {"a": 3})["a"].tolist() == [0, 1, 3]
    model, samples = ADAPTERS["llama"]()
    first = planned(GluWidth(score="first", ratio=0.5), model, samples)
    assert all(g.kept == tuple(range(10)) for g in first.groups if g.kind == "neuron")


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("rule", ["uniform", "global"])
def test_a_share_of_the_whole_model(budget: str, rule: str) -> None:
    model, samples = causal("llama", intermediate_size=60)
    costs = costs_of(model, samples)
    plan = planned(GluWidth(budget=budget, keep_rule=rule, ratio=0.2), model, samples)  # type: ignore[arg-type]
    left = costs_of(cut(model, plan), samples).total(budget)  # type: ignore[arg-type]
    assert left <= 0.8 * costs.total(budget) < left + 2 * (costs.total(budget) - left) / 10  # type: ignore[arg-type]
    assert plan.ratio_reached == pytest.approx(1 - left / costs.total(budget))  # type: ignore[arg-type]
    assert (len(set(widths(plan))) == 1) or rule == "global"
    with pytest.raises(InputError, match="prune.ratio=0.9"):
        planned(GluWidth(budget=budget, keep_rule=rule, ratio=0.9), model, samples)  # type: ignore[arg-type]


def test_round_to_and_explicit_widths() -> None:
    model, samples = causal("llama", intermediate_size=32)
    plan = planned(GluWidth(ratio=0.3, round_to=8), model, samples)
    assert widths(plan) == [16, 16] and plan.ratio_reached == 0.5 and plan.ratio_asked == 0.3
    assert widths(planned(GluWidth(width=24, round_to=8), model, samples)) == [24, 24]
    assert widths(planned(GluWidth(ratio=0.0, round_to=8), model, samples)) == [32, 32]
    assert planned(GluWidth(ratio=0.0), model, samples).is_identity


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(round_to=6), "prune.round_to=6: must divide the width of every MLP; .* has 20 neurons"),
        (dict(round_to=64), "prune.round_to=64: must divide the width"),
        (dict(width=21), "prune.width=21: must be at most 20"),
        (dict(ratio=0.99, min_keep=2), "prune.ratio=0.99: would leave 1 of 20 neurons of"),
        (dict(ratio=0.9, round_to=4), "prune.ratio=0.9: would leave 0 of 20 neurons of .* at least 4 must stay"),
        (
            dict(ratio=0.99, keep_rule="global", min_keep=3),
            "prune.ratio=0.99: would leave 0 of 40 neurons in all layers",
        ),
    ],
)
def test_what_can_not_be_reached_is_refused_before_any_work(given: dict, message: str) -> None:
    model, samples = ADAPTERS["llama"]()
    with pytest.raises(InputError, match=message):
        GluWidth(**given).check(costs_of(model, samples))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(score="loudest"), "score='loudest' must be one of peak_to_peak, l2, l1, variance, wanda"),
        (dict(keep_rule="best"), "keep_rule='best' must be one of uniform, global"),
        (dict(ratio=1.0), r"ratio=1.0 must be in \[0"),
        (dict(round_to=0), "round_to=0 must be at least 1"),
        (dict(width=0), "width=0 must be at least 1"),
        (dict(width=100, round_to=64), "prune.width=100: must be a multiple of prune.round_to=64"),
        (dict(width=16, ratio=0.2), "prune.width=16, prune.ratio=0.2: give one of the two"),
        (dict(width=16, keep_rule="global"), "must be null unless prune.keep_rule=uniform"),
    ],
)
def test_settings_that_make_no_sense(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GluWidth(**given)


def test_a_model_without_neurons_is_refused() -> None:
    model, samples = ADAPTERS["resnet_basic"]()
    with pytest.raises(InputError, match="no neurons of MLPs to remove; it has channel"):
        GluWidth().check(costs_of(model, samples))


def test_a_score_that_is_not_finite_ends_the_run() -> None:
    model, samples = ADAPTERS["llama"]()
    with torch.no_grad():
        model.network.get_parameter("model.embed_tokens.weight").fill_(math.nan)
    assert GluWidth().rank(model, bundle_of(samples))
    for score in ("wanda", "data_driven"):
        with pytest.raises(RunError, match=rf"neurons \({score}\): 20 of 20 are NaN or infinite"):
            GluWidth(score=score).rank(model, bundle_of(samples))  # type: ignore[arg-type]


def test_scores_are_kept_whatever_the_ratio_and_the_rule(tmp_path: Path) -> None:
    model, samples = ADAPTERS["llama"]()
    data, store = bundle_of(samples), Store(tmp_path)
    for score in SCORES:
        method = GluWidth(score=score, ratio=0.1)  # type: ignore[arg-type]
        assert not ranked(method, model, data, store).hit
        again = GluWidth(score=score, ratio=0.5, keep_rule="global")  # type: ignore[arg-type]
        assert ranked(again, model, data, store).hit
    assert not ranked(GluWidth(score="random", seed=1), model, data, store).hit


def test_width_then_depth_then_heads(tmp_path: Path) -> None:
    model, samples = causal("llama", num_hidden_layers=3)
    narrow = cut(model, planned(GluWidth(ratio=0.2), model, samples))
    depth, heads = Depth(blocks=1), Fisher(kinds=("head",), budget="width", ratio=0.3)
    costs = costs_of(narrow, samples)
    short = depth.apply(narrow, depth.plan(narrow, depth.rank(narrow, bundle_of(samples)), costs))
    plan = heads.plan(short, heads.rank(short, bundle_of(samples)), costs_of(short, samples))
    final = cut(short, plan)
    folder = save_model(final, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    sizes = [config[name] for name in ("intermediate_size", "num_hidden_layers", "num_key_value_heads")]
    assert sizes == [16, 2, 2]
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(stock(**samples).logits, logits(final, samples))
    assert torch.equal(logits(llama(checkpoint=str(folder)), samples), logits(final, samples))


def test_it_runs_from_the_command_line(composed: Compose, tmp_path: Path) -> None:
    sizes = ("model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, num_attention_heads: 4, "
             "num_key_value_heads: 2, max_position_embeddings: 64}")  # fmt: skip
    short = ("data.length=32", "data.calibration_length=16", "data.calibration_samples=8", "data.train_samples=20",
             "data.calibration_batch_size=4", "data.validation_samples=4", "model.training.epochs=1")  # fmt: skip
    given = ("+experiment=tiny_llama_width", sizes, "prune.score=data_driven", f"storage={tmp_path}/s")
    record = run(composed(*given, *short), tmp_path)
    assert record.status == "ok" and record.method == "glu_width_data_driven"
    assert record.plan and record.plan.details["neurons"] == {"kept": 32, "count": 40, "removed": pytest.approx(0.2)}
    assert (tmp_path / "plots" / "scores_data_driven.png").is_file() and "loads with the family" in str(record.saved)
