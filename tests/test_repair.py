"""Repairing a cut model: against slow loops with least squares, and what may not happen."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prune.repair.rows
from models.base import Batch, PrunableModel
from models.checkpoint import load_model, save_model
from models.cost import cost_model
from prune.base import Plan
from prune.gates import gated
from prune.rankers.random import Random
from prune.repair import rebuild
from prune.repair.batches import merged, regrouped
from prune.repair.gates import damped_solution, gate_equations, tuned_scales
from prune.repair.normal import STRIPE, Normal, gram
from prune.repair.rebuild import Pair
from prune.repair.refit import refitted
from prune.repair.repairs import Repair, Repairs, reads_first_token, repaired
from prune.repair.rows import readers
from prune.repair.solvers import Refit
from prune.repair.streams import advance_all, streams
from prune.rewriting import applied
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of
from utils.errors import InputError
from utils.hooks import hooked, is_hooked
from utils.storage import Store

# where the stream begins to hold what a consumer gives, and as what: what the next norm reads, or what the block gives
FAMILIES = {
    "toy_images": [("blocks.{}.attention.out", "blocks.{}.norm2", "reads"), ("blocks.{}.fc2", "blocks.{}", "gives")],
    "deit": [("blocks.{}.attn.proj", "blocks.{}.norm2", "reads"), ("blocks.{}.mlp.fc2", "blocks.{}", "gives")],
    "vit_swiglu": [("blocks.{}.attn.proj", "blocks.{}.norm2", "reads"), ("blocks.{}.mlp.fc2", "blocks.{}", "gives")],
    "bert": [
        ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.attention.output.LayerNorm", "reads"),
        ("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.output.LayerNorm", "reads"),
    ],
    "llama": [
        ("model.layers.{}.self_attn.o_proj", "model.layers.{}.post_attention_layernorm", "reads"),
        ("model.layers.{}.mlp.down_proj", "model.layers.{}", "gives"),
    ],
}


def half(model: PrunableModel, share: float = 0.5, seed: int = 3) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    kept = {
        g.name: torch.randperm(g.count, generator=generator)[: max(1, round(share * g.count))].sort().values
        for g in model.unit_groups()
    }
    return Plan.of(model, kept)


def repair(
    model: PrunableModel, plan: Plan, samples: Batch, tmp_path: Path, *steps: Repair, **settings: Any
) -> PrunableModel:
    return repaired(Repairs(steps, **settings), model, plan, bundle_of(samples), Store(tmp_path))[0]


def read(network: nn.Module, names: list[str], call: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read and give in one forward pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, out: found.__setitem__(
            name, (args[0].detach().clone(), (out if isinstance(out, Tensor) else out[0]).detach().clone())
        )

    with torch.no_grad(), hooked(after=[(network.get_submodule(name), hook(name)) for name in names]):
        call()
    return found


def slow_refit(
    family: str, model: PrunableModel, plan: Plan, samples: Batch, ridge: float, follow: float, valid: Tensor
) -> PrunableModel:
    """Consumer by consumer, both models from the start each time, rows stacked, numpy's least squares."""
    student = cut(model, plan)
    places = [tuple(p.format(layer) for p in place) for layer in range(2) for place in FAMILIES[family]]
    for consumer, where, how in places:
        seen = [read(m.network, [consumer, where], lambda m=m: m.logits(m.place(samples))) for m in (model, student)]
        sums = [s[where][0 if how == "reads" else 1] for s in seen]
        scale = 1.0 if "swiglu" not in family else 0.0
        module: Any = student.network.get_submodule(consumer)
        if not scale:  # the factor behind the consumer, by the block's own names
            half_name = "ls1" if "attn" in consumer else "ls2"
            block = consumer.split(".")[1]
            scale = model.network.get_submodule(f"blocks.{block}.{half_name}").gamma.detach()  # type: ignore[assignment]
        residuals = [total - s[consumer][1] * scale for total, s in zip(sums, seen, strict=True)]
        target = seen[0][consumer][1] + follow * (residuals[0] - residuals[1]) / scale
        x, r = (t[valid].double().numpy() for t in (seen[1][consumer][0], target - seen[1][consumer][1]))
        pull = np.sqrt(ridge * np.mean((x**2).sum(axis=0)))
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        rows = np.concatenate([x, pull * np.eye(x.shape[1])[:-1]])
        delta = np.linalg.lstsq(rows, np.concatenate([r, np.zeros((len(rows) - len(r), r.shape[1]))]))[0]
        module.weight.data += torch.from_numpy(delta[:-1].T).float()
        module.bias.data += torch.from_numpy(delta[-1]).float()
    return student


def valid_tokens(samples: Batch, tokens: int) -> Tensor:
    mask = samples.get("attention_mask")
    return torch.ones(len(next(iter(samples.values()))), tokens).bool() if mask is None else mask.bool()


@pytest.mark.parametrize("follow", [1.0, 0.0, 0.4])
@pytest.mark.parametrize("family", FAMILIES)
def test_refit_is_least_squares_in_order(family: str, follow: float, tmp_path: Path) -> None:
    model, samples = ADAPTERS[family]()
    plan = half(model)
    tokens = read(model.network, [FAMILIES[family][0][0].format(0)], lambda: model.logits(samples))
    count = next(iter(tokens.values()))[0].shape[1]
    slow = slow_refit(family, model, plan, samples, 0.1, follow, valid_tokens(samples, count))
    fast = repair(model, plan, samples, tmp_path, "refit", ridge=0.1, follow=follow)
    for name, wanted in slow.network.state_dict().items():
        found = fast.network.state_dict()[name]
        assert torch.allclose(found, wanted, atol=2e-3, rtol=2e-3), (name, (found - wanted).abs().max())
    plain = cut(model, plan)
    changed = FAMILIES[family][1][0].format(1) + ".weight"
    assert not torch.allclose(plain.network.state_dict()[changed], fast.network.state_dict()[changed], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_knows_what_its_output_is_added_to(family: str) -> None:
    model, samples = ADAPTERS[family]()
    own = readers(model, "test")
    names = [place.format(layer) for layer in range(2) for p in FAMILIES[family] for place in p[:2]]
    seen = read(model.network, names, lambda: model.logits(samples))
    with torch.no_grad(), streams(model, list(own), [samples]) as running:
        for layer in range(2):
            for consumer, where, how in FAMILIES[family]:
                reached = advance_all(running, {})
                assert reached is not None and reached[0] == consumer.format(layer)
                (stop,) = reached[1]
                total = seen[where.format(layer)][0 if how == "reads" else 1]
                assert stop.residual is not None
                scaled = stop.output if stop.scale is None else stop.output * stop.scale
                torch.testing.assert_close(stop.residual + scaled, total, atol=1e-5, rtol=1e-5)
                assert (stop.scale is not None) == (family == "vit_swiglu")
        assert advance_all(running, {}) is None
    assert not is_hooked(model.network)


@pytest.mark.parametrize(
    ("name", "step"),
    [*((name, "refit") for name in ADAPTERS), *product(["deit", "conv", "bert", "llama_plain"], ["bias", "gates"])],
)
def test_nothing_gone_changes_nothing(name: str, step: Repair, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    found = repair(model, Plan.of(model, {}), samples, tmp_path, step, ridge=0.01)
    for key, tensor in model.network.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[key], tensor, atol=2e-4, rtol=2e-4)
    assert not is_hooked(model.network)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_every_adapter_comes_nearer_to_its_dense_answers(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    plan = half(model, 0.7)
    pruned, facts, _ = repaired(Repairs(("refit",), ridge=1e-4), model, plan, bundle_of(samples), Store(tmp_path))
    assert {row["consumer"] for row in facts["refit"]} == {g.consumer.module for g in model.unit_groups()}
    assert all(row["error_after"] <= row["error_before"] * 1.0001 + 1e-9 for row in facts["refit"])
    with torch.no_grad():
        placed = model.place(samples)
        dense, plain, better = (m.logits(placed) for m in (model, cut(model, plan), pruned))
    valid = samples.get("attention_mask") if dense.ndim == 3 else None
    errors = [(out - dense).square() for out in (plain, better)]
    before, after = (float((e if valid is None else e[valid.bool()]).mean()) for e in errors)
    assert after < before


def test_a_unit_that_others_can_stand_in_for_is_no_loss(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    fc1: Any = model.network.get_submodule("blocks.0.fc1")
    with torch.no_grad():
        for tensor in (fc1.weight, fc1.bias):
            tensor[7] = tensor[2]
    kept = torch.tensor([unit for unit in range(20) if unit != 7])
    plan = Plan.of(model, {"blocks.0.neurons": kept})
    with torch.no_grad():
        dense, plain = model.logits(samples), cut(model, plan).logits(samples)
        found = repair(model, plan, samples, tmp_path, "refit", ridge=0.0).logits(samples)
    assert (plain - dense).abs().max() > 1e-2
    torch.testing.assert_close(found, dense, atol=2e-4, rtol=2e-4)


def test_padding_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["bert"]()
    plan, pads = half(model), samples["attention_mask"] == 0
    other = samples | {"input_ids": samples["input_ids"].masked_fill(pads, 17)}
    for step in ("bias", "refit", "gates"):
        first, second = (
            repair(model, plan, s, tmp_path / f"{step}{i}", step).network.state_dict()
            for i, s in enumerate((samples, other))
        )
        assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)
        with monkeypatch.context() as patch:
            patch.setattr(prune.repair.rows, "tokens_of", lambda inputs, batch: inputs.flatten(0, 1))
            third = repair(model, plan, samples, tmp_path / f"{step}2", step).network.state_dict()
        assert not all(torch.allclose(first[n], third[n], atol=1e-4) for n in first), "padding should have counted"


@pytest.mark.parametrize("name", ["toy_images", "bert", "conv", "resnet_bottleneck", "llama_plain"])
def test_bias_takes_the_mean_of_what_goes(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    plan = half(model)
    found, plain = repair(model, plan, samples, tmp_path, "bias"), cut(model, plan)
    for group in model.unit_groups():
        consumer: Any = model.network.get_submodule(group.consumer.module)
        gone = torch.ones(group.count)
        gone[plan.kept[group.name]] = 0
        seen = read(model.network, [group.consumer.module], lambda: model.logits(samples))
        inputs = seen[group.consumer.module][0]
        channels = torch.zeros(inputs.shape[group.consumer.channel_axis])
        channels[group.consumer.index[gone.bool()].flatten()] = 1
        shape = [-1 if axis == group.consumer.channel_axis % inputs.ndim else 1 for axis in range(inputs.ndim)]
        with torch.no_grad():
            parts = consumer.forward(inputs * channels.view(shape)) - consumer.forward(inputs * 0)
        if parts.ndim == 4:
            mean = parts.mean(dim=(0, 2, 3))
        else:
            mean = parts[valid_tokens(samples, parts.shape[1])].mean(dim=0)
        name_of = f"{group.consumer.module}.bias"
        old = dict(plain.network.named_parameters()).get(name_of, torch.zeros(()))
        added = found.network.get_parameter(name_of) - old
        makes = f"{group.consumer.module}.weight"  # where it makes units itself, its outputs go with them
        made = [g for g in model.unit_groups() if any(part.tensor == makes for part in g.producers)]
        left = plan.kept[made[0].name] if made else torch.arange(len(mean))
        torch.testing.assert_close(added.detach(), mean[left], atol=1e-4, rtol=1e-4)
        assert mean.abs().max() > 1e-3


def test_convolutions_are_refitted_window_by_window(tmp_path: Path) -> None:
    model, samples = ADAPTERS["conv"]()
    kept = torch.tensor([0, 2, 3, 6, 9])
    plan = Plan.of(model, {"conv1.channels": kept})
    found = repair(model, plan, samples, tmp_path, "refit", ridge=0.05, follow=0.0)
    dense = read(model.network, ["conv2"], lambda: model.logits(samples))["conv2"]
    x, y = dense[0][:, kept], dense[1]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    rows = [padded[b, :, i : i + 3, j : j + 3].flatten() for b in range(6) for i in range(6) for j in range(6)]
    wanted = [y[b, :, i, j] for b in range(6) for i in range(6) for j in range(6)]
    conv: Any = model.network.get_submodule("conv2")
    old = conv.weight.detach()[:, kept].flatten(1).T.double()
    matrix = torch.stack(rows).double()
    rest = torch.stack(wanted).double() - matrix @ old - conv.bias.detach().double()
    pull = (0.05 * matrix.square().sum(0).mean()).sqrt() * torch.eye(matrix.shape[1] + 1).double()[:-1]
    system = torch.cat([torch.cat([matrix, torch.ones(len(matrix), 1).double()], dim=1), pull])
    delta = torch.linalg.lstsq(system, torch.cat([rest, rest.new_zeros(len(pull), 4)])).solution
    changed = found.network.get_parameter("conv2.weight").detach().flatten(1).T
    torch.testing.assert_close(changed, (old + delta[:-1]).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("ridge", "biased"), [(0.0, True), (0.3, True), (0.3, False), (0.0, False)])
@pytest.mark.parametrize("columns", [0, 1, 5])
def test_refitted_solves_by_ridge(ridge: float, biased: bool, columns: int) -> None:
    x, r = torch.randn(40, columns, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64) + 2
    normal = Normal.none(columns, 3, torch.device("cpu")).add(x[:15], r[:15]).add(x[15:], r[15:])
    assert normal.rows == 40
    delta = refitted(normal, ridge, biased)
    used = torch.cat([x, torch.ones(40, 1)], dim=1)[:, : columns + biased]
    pull = torch.zeros(columns + biased, dtype=torch.float64)
    pull[:columns] = ridge * x.square().sum(0).mean() if columns else 0
    wanted = torch.linalg.pinv(used.T @ used + pull.diag()) @ used.T @ r
    torch.testing.assert_close(delta[: columns + biased], wanted)
    assert biased or not delta[-1].any()
    full = torch.cat([x, torch.ones(40, 1)], dim=1)
    torch.testing.assert_close(normal.error_after(delta), (r - full @ delta).square().sum(0))


def test_columns_that_say_the_same_share_the_change() -> None:
    x = torch.randn(30, 1, dtype=torch.float64).expand(30, 2)
    normal = Normal.none(2, 1, torch.device("cpu")).add(x, 3 * x[:, :1])
    delta = refitted(normal, 0.0, biased=True)
    torch.testing.assert_close(delta[:2, 0], torch.full((2,), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("intercept", [False, True])
def test_scales_solve_the_damped_system(width: int, count: int, intercept: bool) -> None:
    torch.manual_seed(width)
    columns = width * count
    x, w = torch.randn(25, columns, dtype=torch.float64), torch.randn(columns, 6, dtype=torch.float64)
    wanted = torch.randn(25, 6, dtype=torch.float64) + x @ w * 1.3
    # A as it is written down: one column a unit, all its rows and outputs below each other
    parts = [torch.zeros(25, 6, dtype=torch.float64) for _ in range(count)]
    for unit in range(count):
        for column in range(unit * width, (unit + 1) * width):
            parts[unit] += torch.outer(x[:, column], w[column])
    a = torch.stack([part.flatten() for part in parts] + ([torch.ones(150).double()] if intercept else []), dim=1)
    rest = (wanted - x @ w).flatten()
    normal = Normal.none(columns, 6, torch.device("cpu")).add(x, wanted - x @ w)
    units = torch.arange(count).repeat_interleave(width)
    left, right = gate_equations(normal, w, units, count, intercept)
    torch.testing.assert_close(left, a.T @ a)
    torch.testing.assert_close(right, a.T @ rest)
    damped = torch.linalg.lstsq(
        torch.cat([left, torch.eye(len(left)).double()]), torch.cat([right, right.new_zeros(len(right))])
    ).solution
    torch.testing.assert_close(damped_solution(left, right), damped)
    from scipy.sparse.linalg import lsmr

    slow = lsmr(left.numpy(), right.numpy(), damp=1.0, atol=1e-14, btol=1e-14, conlim=0, maxiter=1000)[0]
    torch.testing.assert_close(damped, torch.from_numpy(slow), atol=1e-6, rtol=1e-6)
    scales = tuned_scales(normal, w, units, count, intercept)
    assert scales is not None
    torch.testing.assert_close(scales, 1 + damped[:count])


def test_tuning_ends_where_a_scale_is_too_large_or_not_found() -> None:
    x, w = torch.ones(200, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    unit = torch.zeros(1).long()
    for factor, fine in ((9.0, True), (11.0, False), (-11.5, False), (torch.inf, False)):
        normal = Normal.none(1, 1, torch.device("cpu")).add(x, x * (factor - 1))
        assert (tuned_scales(normal, w, unit, 1, False) is not None) == fine
    empty = Normal.none(1, 1, torch.device("cpu")).add(x * 0, x)
    assert tuned_scales(empty, w, unit, 1, False, damp=0.0) is None


def test_folded_scales_are_gates(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    plan = half(model)
    found, plain = repair(model, plan, samples, tmp_path, "gates"), cut(model, plan)
    gates = {}
    for group in plain.unit_groups():
        new, old = (m.network.get_parameter(f"{group.consumer.module}.weight").detach() for m in (found, plain))
        ratios = (new / old)[:, group.consumer.index]  # (D, count, width)
        gates[group.name] = ratios.median(dim=0).values.median(dim=-1).values
        torch.testing.assert_close(ratios, gates[group.name][None, :, None].expand_as(ratios), atol=1e-3, rtol=1e-3)
    assert torch.equal(gates["blocks.0.heads"], torch.ones(2)), "the first attention is not tuned"
    assert not torch.allclose(gates["blocks.0.neurons"], torch.ones(12), atol=1e-2)
    with torch.no_grad(), gated(plain, gates):
        expected = plain.logits(samples)
    torch.testing.assert_close(found.network(samples["inputs"]), expected, atol=1e-4, rtol=1e-4)


def test_the_last_neurons_of_a_classifier_count_by_their_first_token() -> None:
    for name, wanted in {"deit": True, "bert": True, "toy_images": True, "deit_distilled": False, "llama": False,
                         "bert_question_answering": False, "vit_qk_norm": False}.items():  # fmt: skip
        model, samples = ADAPTERS[name]()
        assert reads_first_token(model, samples) == wanted, name
        assert not is_hooked(model.network)


def test_labels_are_not_looked_at(tmp_path: Path) -> None:
    model, samples = ADAPTERS["bert"]()
    bare = {name: tensor for name, tensor in samples.items() if name != "labels"}
    for step in ("bias", "refit", "gates"):
        first, second = (
            repair(model, half(model), s, tmp_path / f"{step}{i}", step).network.state_dict()
            for i, s in enumerate((samples, bare))
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["toy_images", "bert", "llama", "conv"])
def test_emptied_groups_get_a_bias(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    groups = model.unit_groups()
    plan = Plan.of(model, {groups[0].name: torch.zeros(0).long(), groups[-1].name: torch.tensor([0])})
    for step in ("bias", "refit", "gates"):
        if step == "bias" and name == "conv":
            continue
        found = repair(model, plan, samples, tmp_path, step)
        assert found.logits(samples).isfinite().all()


@pytest.mark.parametrize("name", ["toy_images", "bert", "llama"])
def test_half_precision_is_solved_in_full(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    full = repair(model, half(model), samples, tmp_path, "refit")
    model.network.bfloat16()
    found = repair(model, half(model), samples, tmp_path, "refit")
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        ours, theirs = found.logits(found.place(samples)).float(), full.logits(samples)
        plain = cut(model, half(model)).logits(model.place(samples)).float()
    assert (ours - theirs).abs().mean() < (plain - theirs).abs().mean()


def test_a_repaired_model_is_saved_like_a_cut_one(tmp_path: Path) -> None:
    model, samples = ADAPTERS["bert"]()
    found = repair(model, half(model), samples, tmp_path, "bias", "refit", "gates")
    save_model(found, tmp_path / "model")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.logits(samples), found.logits(samples))


def test_biases_that_the_family_has_not_are_saved_and_loaded(tmp_path: Path) -> None:
    model, samples = ADAPTERS["llama_plain"]()
    groups = {g.name: torch.arange(g.count - 1) for g in model.unit_groups()}
    found = repair(model, Plan.of(model, groups), samples, tmp_path, "bias", "refit")
    assert (
        found.biased and not model.biased and model.network.get_submodule("model.layers.0.mlp.down_proj").bias is None
    )
    folder = save_model(found, tmp_path / "model")
    assert "biases" in json.loads((folder / "manifest.json").read_text())["not_stock"]
    again = load_model(folder)
    assert again.biased and again.fingerprint() == found.fingerprint()
    with torch.no_grad():
        assert torch.equal(again.logits(samples), found.logits(samples))
        twice = cut(again, half(again))
        assert twice.biased and twice.logits(samples).isfinite().all()
    save_model(twice, tmp_path / "twice")
    assert load_model(tmp_path / "twice").fingerprint() == twice.fingerprint()
    assert not load_model(save_model(cut(model, half(model)), tmp_path / "plain")).biased


def test_what_is_kept_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, costs = bundle_of(samples), cost_model(model, bundle_of(samples).example)
    store = Store(tmp_path)
    method = Random(ratio=0.3, repair=("refit",))
    plan = method.plan(model, method.rank(model, data), costs)
    first = applied(method, model, plan, data, store)
    assert not first.hit and first.path is not None and first.fingerprint is not None
    monkeypatch.setattr(rebuild, "_summed", None)
    second = applied(method, model, plan, data, store)
    assert second.hit and second.fingerprint == first.fingerprint
    states = [done.model.network.state_dict() for done in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert second.plan.details == first.plan.details
    for changed in (replace(method, ridge=0.2), replace(method, follow=0.5), replace(method, repair=("gates",))):
        with pytest.raises(TypeError):
            applied(changed, model, plan, data, store)
    assert applied(replace(method, repair=()), model, plan, data, store).fingerprint is None


@pytest.mark.parametrize("name", ["toy_images", "llama"])
def test_students_of_one_teacher_are_rebuilt_abreast_as_by_themselves(name: str) -> None:
    model, samples = ADAPTERS[name]()
    batches, solver = merged(bundle_of(samples).calibration, 2), Refit(0.1, 1.0)
    whole = {group.name: torch.arange(group.count) for group in model.unit_groups()}
    plans = [Random(ratio=ratio).plan(model, Random().rank(model, bundle_of(samples)), cost_model(model, samples))
             for ratio in (0.2, 0.5)]  # fmt: skip

    def pairs() -> list[Pair]:
        return [Pair(model, cut(model, plan), whole, plan.kept, model) for plan in plans]

    abreast, ran = pairs(), list[int]()
    with hooked(before=[(model.network.get_submodule(model.blocks()[0]), lambda module, args: ran.append(1))]):
        found = rebuild.rebuilt_abreast(abreast, batches, solver, "refit")
    assert len(ran) == len(batches), "the teacher runs once for both"
    for pair, together in zip(pairs(), found, strict=True):
        alone = rebuild.rebuilt(pair, batches, solver, "refit", None)
        assert alone.facts == together.facts
        assert all(torch.equal(tensor, together.tensors[name]) for name, tensor in alone.tensors.items())
    first, second = (pair.student.network.state_dict() for pair in abreast)
    assert any(first[name].shape != second[name].shape for name in first)


@pytest.mark.parametrize("columns", [1, 127, 128, 300])
def test_a_gram_matrix_is_the_product_of_all_columns(columns: int) -> None:
    x = torch.randn(50, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(x), x.T @ x, atol=1e-12, rtol=0)
    assert torch.equal(gram(x)[STRIPE:, :STRIPE], gram(x)[:STRIPE, STRIPE:].T)


def test_a_killed_repair_goes_on_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["bert"]()
    monkeypatch.setattr(rebuild, "SAVED_EVERY_S", -1.0)
    steps = ("refit", "gates")
    whole = repair(model, half(model), samples, tmp_path / "a", *steps).network.state_dict()
    change, calls = rebuild._change, list[str]()

    def dying(solver: Any, reader: Any, *others: Any) -> Any:
        calls.append(reader.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return change(solver, reader, *others)

    monkeypatch.setattr(rebuild, "_change", dying)
    with pytest.raises(KeyboardInterrupt):
        repair(model, half(model), samples, tmp_path / "b", *steps)
    assert not is_hooked(model.network)
    assert list((tmp_path / "b").rglob("*.refit.partial"))
    found = repair(model, half(model), samples, tmp_path / "b", *steps).network.state_dict()
    assert calls.count(calls[0]) == 2, "once refitted and once tuned; what was done before is not done again"
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not list((tmp_path / "b").rglob("*.partial"))


def test_batches_are_joined_without_changing_samples() -> None:
    model, samples = ADAPTERS["bert"]()
    parts = bundle_of(samples, batches=6).calibration
    assert [len(b["labels"]) for b in merged(parts, 4)] == [4, 2]
    assert torch.equal(torch.cat([b["input_ids"] for b in merged(parts, 4)]), samples["input_ids"])
    short = {n: t[:1, :4] if t.ndim == 2 else t[:1] for n, t in samples.items()}
    assert len(merged([short, parts[0]], 8)) == 2
    joined = regrouped([short, parts[0]], 2)
    assert joined[0]["attention_mask"].sum(1).tolist() == [4, 9] and joined[0]["input_ids"].shape == (2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(joined[0])[:1], model.logits(short), atol=1e-5, rtol=1e-5)
    order = torch.tensor([5, 5, 0])
    assert torch.equal(regrouped(parts, 2, order)[0]["labels"], samples["labels"][[5, 5]])
    with pytest.raises(InputError, match="no attention mask"):
        regrouped([{"inputs": torch.zeros(1, 3, 2)}, {"inputs": torch.zeros(1, 4, 2)}], 2)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    with pytest.raises(InputError, match="bias must be the first"):
        Random(repair=("refit", "bias"))
    with pytest.raises(InputError, match="name each step once"):
        Random(repair=("refit", "refit"))
    with pytest.raises(InputError, match="ridge"):
        Random(ridge=-1.0)
    with pytest.raises(InputError, match="follow"):
        Random(follow=1.5)
    with pytest.raises(InputError, match="repair"):
        Random(repair=("polish",))  # type: ignore[arg-type]
    empty = replace(bundle_of(samples), calibration=[])
    with pytest.raises(InputError, match="calibration set is empty"):
        repaired(Repairs(("refit",)), model, half(model), empty, Store(tmp_path))
