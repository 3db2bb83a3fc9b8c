"""OPTIN on a causal language model: both engines, padding, what candidates may take, and what is cut."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.base import Batch, PrunableModel
from models.checkpoint import how_to_load, save_model
from models.cost import cost_model
from models.llama import llama
from prune.base import Plan
from prune.optin.candidates import calls_of_block, candidates_at_once
from prune.optin.teacher import Settings, observe
from prune.rankers.optin import Optin
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of, causal
from tests.test_contract import logits
from utils.errors import InputError

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 24, "tie_word_embeddings": True,
    "initializer_range": 0.2,
}  # fmt: skip


def small() -> tuple[PrunableModel, Batch]:
    """A model at fresh weights, in which a unit is a small part of the whole, as in a trained one."""
    torch.manual_seed(0)
    return llama(settings=SIZES), causal("llama")[1]


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def agreement(found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> float:
    """Spearman's correlation over all units of a kind."""
    both = [torch.cat([side[name] for name in wanted if name.endswith(kind)]) for side in (found, wanted)]
    return float(torch.corrcoef(torch.stack([ranks(values) for values in both]))[0, 1])


def test_the_sketch_ranks_as_the_exact_losses() -> None:
    model, samples = small()
    data = bundle_of(samples, batches=1)
    exact = Optin(engine="exact").rank(model, data).terms
    sketch = Optin(engine="sketch", probes=128).rank(model, data).terms
    assert exact.keys() == sketch.keys()
    distances = [{n: t["md"][n] + t["md_final"][n] for n in t["md"]} for t in (sketch, exact)]
    assert agreement(*distances, kind="neurons") > 0.9  # type: ignore[arg-type]
    assert agreement(dict(sketch["kd"]), dict(exact["kd"]), "neurons") > 0.9
    assert all(torch.allclose(sketch["kd"][n], exact["kd"][n], rtol=1e-4) for n in exact["kd"] if n.endswith("heads"))
    shuffled = {name: values.flip(0) for name, values in exact["kd"].items()}
    assert agreement(shuffled, dict(exact["kd"]), "neurons") < 0.6, "or the bound above would show nothing"


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_padding_does_not_count(engine: str) -> None:
    """Neither what stands there, nor how much of it."""
    model, samples = ADAPTERS["llama"]()
    method = Optin(engine=engine, probes=4)  # type: ignore[arg-type]
    first = method.rank(model, bundle_of(samples, batches=1)).terms
    other_pads = samples["input_ids"].masked_fill(samples["attention_mask"] == 0, 7)
    changed = {"input_ids": other_pads, "attention_mask": samples["attention_mask"]}
    longer = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in samples.items()}
    for batch in (changed, longer) if engine == "exact" else (changed,):
        found = method.rank(model, bundle_of(batch, batches=1)).terms
        for term, groups in first.items():
            assert all(torch.allclose(found[term][n], v, rtol=1e-3, atol=1e-5) for n, v in groups.items()), term
    real = {"input_ids": other_pads, "attention_mask": torch.ones_like(samples["attention_mask"])}
    found = method.rank(model, bundle_of(real, batches=1)).terms
    assert not torch.allclose(found["kd"]["model.layers.0.heads"], first["kd"]["model.layers.0.heads"], rtol=1e-2)


def test_logits_of_a_large_vocabulary_count_as_memory() -> None:
    fitting = []
    for vocabulary in (50, 5000):
        model, samples = causal("llama", vocab_size=vocabulary)
        teacher = observe(model, samples, Settings())
        calls = calls_of_block(model, teacher, 0)
        fitting.append(candidates_at_once(calls, teacher.logits, Settings(memory_gb=0.02)))
    assert fitting[0] > 10 * fitting[1] > 0


def planned(method: Optin, model: PrunableModel, samples: Batch) -> Plan:
    costs = cost_model(model, {name: tensor[:1] for name, tensor in samples.items()})
    method.check(costs)
    return method.plan(model, method.rank(model, bundle_of(samples, batches=2)), costs)


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_kv_groups_and_neurons_are_cut_for_real(engine: str, tmp_path: Path) -> None:
    model, samples = small()
    plan = planned(Optin(engine=engine, ratio=0.25), model, samples)  # type: ignore[arg-type]
    assert plan.ratio_reached >= 0.25 and {g.kind for g in plan.groups if len(g.kept) < g.count}
    pruned = cut(model, plan)
    with masked(model, plan):
        assert (logits(pruned, samples) - logits(model, samples)).abs().max() <= 1e-5
    folder = save_model(pruned, tmp_path / "model")
    counts = {kind: {len(g.kept) for g in plan.groups if g.kind == kind} for kind in ("head", "neuron")}
    assert any(len(sizes) > 1 for sizes in counts.values()) and "for all layers, above 0" in how_to_load(folder)
    assert torch.equal(logits(llama(checkpoint=str(folder)), samples), logits(pruned, samples))


@pytest.mark.parametrize("kinds", [("neuron",), ("head",), None])
def test_the_same_part_of_every_layer_is_a_stock_folder(kinds: tuple[str, ...] | None, tmp_path: Path) -> None:
    model, samples = small()
    pruned = cut(model, planned(Optin(budget="width", ratio=0.5, kinds=kinds), model, samples))
    folder = save_model(pruned, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    sizes = tuple(config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    assert sizes == ((8, 4, 12) if kinds == ("neuron",) else (4, 2, 24) if kinds == ("head",) else (4, 2, 12))
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(stock(**samples).logits, logits(pruned, samples))


def test_the_best_units_stay_best_without_the_worst() -> None:
    """Of the KV groups of a layer, the one without which logits move most is never the one that goes."""
    model, samples = small()
    scores = Optin(engine="exact").rank(model, bundle_of(samples, batches=1)).terms["kd"]
    plan = planned(Optin(engine="exact", loss="kd", kinds=("head",), budget="width", ratio=0.25), model, samples)
    heads = [group for group in plan.groups if group.kind == "head"]
    assert all(int(scores[group.name].argmax()) in group.kept and len(group.kept) == 3 for group in heads)


def test_without_calibration_it_is_refused() -> None:
    model, samples = small()
    with pytest.raises(InputError, match="calibration set is empty"):
        Optin().rank(model, bundle_of({name: tensor[:0] for name, tensor in samples.items()}, batches=1))
