"""Memory that runs out: less at once, the same results, and a record that says so."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from data.base import DataBundle
from evals.predictions import predictions_of
from main import run
from models.base import PrunableModel
from models.pretrained import validate
from prune.base import Method
from prune.depth.stream import angular_distances, block_influence
from prune.gates import gate_gradients
from prune.obs.curvature import curvatures
from prune.optin.exact import exact_losses
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings
from prune.rankers.activation import Activation
from prune.rankers.fisher import Fisher
from prune.rankers.taylor import Taylor
from prune.repair.batches import at_most, merged
from prune.rewriting import applied
from prune.weights.matrices import prunable_matrices
from prune.weights.sparsegpt import SparseGPT
from prune.weights.wanda import Wanda
from prune.whole.rows import row_gradients
from prune.whole.scores import gradient_sums
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from utils import memory
from utils.memory import Portions, Shortage, described, out_of_memory, restarted, shortages
from utils.storage import Store

ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    MemoryError,
]
Found = Mapping[str, Tensor]
Scoring = Callable[[PrunableModel, DataBundle], Found]


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes seconds beside everything that the tests have imported."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


@contextmanager
def scarce(
    model: PrunableModel, most: int, error: Callable[[], Exception] = ERRORS[0], gradients_only: bool = False
) -> Iterator[list[int]]:
    """Raise in the last block, behind most of the work, for more samples than `most`; yields how many came."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if gradients_only and not torch.is_grad_enabled():
            return
        seen.append(len(args[0]))
        if len(args[0]) > most:
            raise error()

    handle = model.network.get_submodule(model.blocks()[-1]).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def flat(found: object, name: str = "") -> dict[str, Tensor]:
    """All tensors in a nest of mappings and dataclasses, by a path."""
    if isinstance(found, Tensor):
        return {name: found}
    if isinstance(found, Mapping):
        return {k: v for key, part in found.items() for k, v in flat(part, f"{name}/{key}").items()}
    return flat({k: v for k, v in vars(found).items() if isinstance(v, Tensor | Mapping)}, name)


def linears(model: PrunableModel) -> tuple:
    return prunable_matrices(model)


METHODS: dict[str, tuple[str, Callable[[PrunableModel, DataBundle], object]]] = {
    "fisher": ("deit", lambda m, d: Fisher().rank(m, d).terms),
    "fisher of texts": ("llama", lambda m, d: Fisher().rank(m, d).terms),
    "fisher of answers": ("bert_question_answering", lambda m, d: Fisher().rank(m, d).terms),
    "fisher of numbers": ("bert_regression", lambda m, d: Fisher().rank(m, d).terms),
    "fisher of maps": ("mask2former", lambda m, d: gate_gradients(m, d, "maps")),
    "taylor": ("bert", lambda m, d: Taylor(variant="batch").rank(m, d).terms),
    "taylor of weights": ("toy_images", lambda m, d: Taylor(variant="abs").rank(m, d).terms),
    "weights": ("deit", lambda m, d: gradient_sums(m, d, linears(m), torch.Tensor.square)),
    "rows": ("llama", lambda m, d: row_gradients(m, d, linears(m))),
    "activation": ("bert", lambda m, d: Activation().rank(m, d).terms),
    "obs": ("bert", lambda m, d: curvatures(m, d, 3)),
    "obs of texts": ("llama", lambda m, d: curvatures(m, d, 3)),
    "influence": ("llama", lambda m, d: {"": block_influence(m, d)}),
    "angles": ("llama", lambda m, d: {str(n): v for n, v in angular_distances(m, d).items()}),
    "validation": ("deit", lambda m, d: {n: torch.tensor(v) for n, v in validate(m, d).items()}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("most", [1, 2])
def test_halved_batches_give_the_same(name: str, most: int) -> None:
    adapter, score = METHODS[name]
    model, samples = ADAPTERS[adapter]()
    data = bundle_of(samples, 1)
    wanted, before = flat(score(model, data)), {n: t.clone() for n, t in model.network.state_dict().items()}
    with scarce(model, most, ERRORS[most]) as seen, shortages() as noted:
        found = flat(score(model, data))
    assert max(seen) > most, "nothing ran out"
    assert noted and noted[-1].smaller <= most and all(s.things == "samples" for s in noted)
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(values.abs().max()) for values in wanted.values())
    for key, values in wanted.items():
        noise = 3e-4 * float(values.abs().max()) + 1e-5 * largest
        torch.testing.assert_close(found[key], values, rtol=2e-4, atol=noise)
    assert all(torch.equal(before[n], t) for n, t in model.network.state_dict().items())
    assert not any(p.requires_grad is False or p.grad is not None for p in model.network.parameters())


def test_a_mean_gradient_is_squared_after_its_parts_are_added() -> None:
    """The negative control: squares of the parts are another score."""
    model, samples = ADAPTERS["deit"]()
    data = bundle_of(samples, 1)
    parts = replace(data, calibration=at_most(data.calibration, 2))
    whole, apart = (flat(Fisher().rank(model, d).terms) for d in (data, parts))
    assert any(not torch.allclose(whole[name], apart[name] / 9, rtol=0.05) for name in whole)


@pytest.mark.parametrize("adapter", ["deit", "bert", "llama", "toy_images", "swin", "resnet_basic"])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_the_sketch_is_differentiated_in_parts(adapter: str, error: Callable[[], Exception]) -> None:
    model, samples = ADAPTERS[adapter]()
    data, settings = bundle_of(samples, 1), Settings(rows=30)
    wanted = flat(sketched_losses(model, data, settings, 5))
    with scarce(model, 2, error, gradients_only=True) as seen, shortages() as noted:
        found = flat(sketched_losses(model, data, settings, 5))
    assert max(seen) > 2 and [(s.work, s.smaller) for s in noted] == [("optin sketch", 3), ("optin sketch", 1)]
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, rtol=1e-3, atol=1e-3 * float(values.abs().max() + 1e-6))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_candidates_are_halved(error: Callable[[], Exception]) -> None:
    model, samples = ADAPTERS["deit"]()
    data = bundle_of(samples, 1)
    wanted = flat(exact_losses(model, data, Settings()))
    with scarce(model, 6 * 3, error) as seen, shortages() as noted:
        found = flat(exact_losses(model, data, Settings()))
    assert max(seen) > 18 and {s.things for s in noted} == {"candidates"}
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), Fisher(ratio=0.3, repair=("bias", "refit", "gates"))])
def test_rewritten_weights_are_the_same(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["llama"]()
    data = bundle_of(samples, 1)
    plan = method.plan(model, method.rank(model, data), cost_of(model, data))
    wanted = applied(method, model, plan, data, Store(tmp_path / "whole")).model.network.state_dict()
    forward, refused = LlamaDecoderLayer.forward, []

    def tight(self: LlamaDecoderLayer, states: Tensor, *args: object, **settings: object) -> object:
        if len(states) > 2 and self.self_attn.layer_idx == 1:
            refused.append(len(states))
            raise ERRORS[1]()
        return forward(self, states, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", tight)
    with shortages() as noted:
        found = applied(method, model, plan, data, Store(tmp_path / "parts")).model
    assert refused and noted
    for name, values in found.network.state_dict().items():
        torch.testing.assert_close(values, wanted[name], rtol=2e-3, atol=1e-4)


def cost_of(model: PrunableModel, data: DataBundle):
    from models.cost import cost_model

    return cost_model(model, data.example)


@pytest.mark.parametrize("adapter", ["deit", "bert", "llama", "mask2former", "bert_question_answering"])
def test_answers_are_the_same(adapter: str) -> None:
    model, samples = ADAPTERS[adapter]()
    data = bundle_of(samples, 1)
    wanted = predictions_of(model, data)
    with scarce(model, 4) as seen, shortages() as noted:
        found = predictions_of(model, data)
    assert seen[0] == 6 and noted == [Shortage("evaluation", "samples", 6, 3)]
    for (logits, batch), (other, same) in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)
        assert batch.keys() == same.keys() and all(torch.equal(batch[n], same[n]) for n in batch)


def test_what_did_not_fit_is_not_tried_again() -> None:
    tried: list[int] = []

    def do(rows: range) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 3:
            raise MemoryError
        return [*rows]

    portions = Portions("work")
    assert [i for part in portions.each(10, do) for i in part] == [*range(10)]
    assert [i for part in portions.each(4, do) for i in part] == [*range(4)]
    assert tried == [10, 5, 2, 2, 2, 2, 2, 2, 2]


def test_nothing_is_done_once() -> None:
    assert [*Portions("work").each(0, lambda rows: len(rows))] == [0]


@pytest.mark.parametrize("error", [ValueError("memory"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_are_raised(error: BaseException) -> None:
    def do(size: object) -> None:
        raise error

    with shortages() as noted:
        for work in (lambda: [*Portions("w").each(4, do)], lambda: restarted("w", 4, do)):
            with pytest.raises(type(error)):
                work()
    assert not noted and not out_of_memory(error)


@pytest.mark.parametrize("make", ERRORS)
def test_one_sample_that_does_not_fit_is_the_end(make: Callable[[], Exception]) -> None:
    def do(size: object) -> None:
        raise make()

    with pytest.raises(type(make())):
        list(Portions("w").each(4, do))
    with pytest.raises(type(make())):
        restarted("w", 4, do)


def test_one_of_several_processes_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    tried: list[int] = []

    def do(size: int) -> None:
        tried.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        restarted("w", 4, do)
    assert tried == [4]


def test_batches_are_split_in_order() -> None:
    batch = {"x": torch.arange(7)}
    parts = at_most([batch, {"x": torch.arange(2)}], 3)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6], [0, 1]]
    assert [len(part["x"]) for part in merged(parts, 4)] == [3, 4, 2]


def test_the_record_says_so(small_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.toy_encoder import ToyEncoder

    cfg = small_config("evals=[accuracy]", "prune=fisher", f"storage={tmp_path / 'a'}")
    whole = run(cfg, tmp_path / "whole")
    logits = ToyEncoder.logits

    def tight(self: ToyEncoder, batch: dict[str, Tensor]) -> Tensor:
        if len(batch["inputs"]) > 20 and not self.network.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return logits(self, batch)

    monkeypatch.setattr(ToyEncoder, "logits", tight)
    record = run(small_config("evals=[accuracy]", "prune=fisher", f"storage={tmp_path / 'b'}"), tmp_path / "tight")
    found = json.loads((tmp_path / "tight" / "result.json").read_text())
    assert {s["work"] for s in found["out_of_memory"]} == {"fisher", "evaluation", "validation"}
    assert all(described(s) in found["warnings"] for s in record.shortages)
    assert "Memory was too small for" in (tmp_path / "tight" / "report.md").read_text()
    assert record.plan == whole.plan and not whole.shortages
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["out_of_memory"] == []
    for side in ("dense", "pruned"):
        assert getattr(record, side)["accuracy"].value == pytest.approx(getattr(whole, side)["accuracy"].value)
