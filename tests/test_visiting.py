"""Blocks that lie in main memory and visit the device: nothing changes but what is there at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.base import DataBundle
from evals.evaluate import evaluate
from evals.latency import Latency
from evals.loss import Loss
from evals.peak_memory import PeakMemory
from evals.throughput import Throughput
from main import run
from models.base import Batch, PrunableModel
from models.visiting import settle, visit
from prune.weights.masks import Pattern, lowest, pattern_mask
from prune.weights.sequential import zero_where
from prune.weights.sparsegpt import Factor, sparsegpt
from prune.weights.statistics import SquaredNorms
from prune.weights.walk import Walk
from prune.weights.wanda import Wanda, wanda
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.sparse import applied_to, linear, same, tiny_llama, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MODELS = {
    "llama": tiny_llama,
    **{n: lambda n=n: (ADAPTERS[n]()[0], bundle_of(ADAPTERS[n]()[1])) for n in ("toy_images", "deit", "bert")},
}


class OnDevice(TorchDispatchMode):
    """Bytes of tensors alive on CUDA, and the most there were; tensors may be fake, and no GPU need be there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)
        return found

    @property
    def held(self) -> int:
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())


@contextmanager
def fake_device() -> Iterator[tuple[FakeTensorMode, OnDevice]]:
    """A device without memory of its own, where operations on tensors of two devices fail as on a real one."""
    with FakeTensorMode() as mode, OnDevice() as counted:
        yield mode, counted


def size_of(*modules: nn.Module) -> int:
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def faked(model: PrunableModel, mode: FakeTensorMode) -> None:
    """Fake tensors in a model's place; all but its blocks on the fake device."""
    inside = {id(m) for name in model.blocks() for m in model.network.get_submodule(name).modules()}
    made: dict[int, Tensor] = {}
    for module in model.network.modules():
        place = CPU if id(module) in inside else CUDA
        tables: list[Any] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in [(n, t) for n, t in table.items() if t is not None]:
                table[name] = made.setdefault(id(tensor), mode.from_tensor(tensor).to(place))


def visiting_blocks(model: PrunableModel) -> None:
    settle(model, CPU, visiting=True)
    model.visited = CUDA
    for name in model.blocks():
        vars(model.network.get_submodule(name))["visits"] = CUDA


@pytest.mark.parametrize("name", list(MODELS))
def test_a_forward_pass_holds_one_block_at_a_time(name: str) -> None:
    model, data = MODELS[name]()
    expected = model.logits(data.calibration[0]).shape
    blocks = [model.network.get_submodule(block) for block in model.blocks()]
    one, every = max(map(size_of, blocks)), size_of(*blocks)
    visiting_blocks(model)
    with fake_device() as (mode, counted), torch.no_grad():
        faked(model, mode)
        batch = {n: mode.from_tensor(t) for n, t in data.calibration[0].items()}
        before = counted.held
        assert model.logits(model.place(batch)).shape == expected
        visiting = counted.peak - before
        with visit(model.network, CUDA):  # control: all of it at once
            model.logits(model.place(batch))
        whole = counted.peak - before
    assert one <= visiting and whole >= every and visiting < whole - every + 2 * one


def test_the_walk_holds_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and masks on the fake device; no step waits for it, or the fake one could not say its result."""
    model, data = tiny_llama()
    one = size_of(model.network.get_submodule(model.blocks()[0]))
    monkeypatch.setattr("prune.weights.walk.move_all_but_blocks", lambda *_: None)
    seen = []
    with fake_device() as (mode, counted), torch.no_grad():
        faked(model, mode)
        batches: list[Batch] = [{n: mode.from_tensor(t) for n, t in batch.items()} for batch in data.calibration]
        outside = counted.held
        walk = Walk(model, batches, CUDA, offload=True)
        for layer, block in enumerate(model.blocks()):
            module = model.network.get_submodule(block)
            names = [n for n, m in model.network.named_modules() if n.startswith(f"{block}.") and type(m) is nn.Linear]
            with walk.resident(layer):
                assert {p.device for p in module.parameters()} == {CUDA}
                for stage, statistic in walk.statistics(layer, names, SquaredNorms):
                    for name in stage:
                        weight = linear(model, name).weight.detach()
                        zero_where(weight, lowest(wanda(weight, statistic.norms()), 5))
                walk.advance(layer)
            assert {p.device for p in module.parameters()} == {CPU}
            seen.append(counted.held - outside)
    outputs = sum(t.numel() * t.element_size() for t in walk.outputs)
    assert max(seen) < one + 2 * outputs, "what a block leaves on the device is the data behind it"
    assert counted.peak - outside < 2 * one + 20 * outputs


def upper(size: int) -> Tensor:
    return torch.eye(size) + torch.rand(size, size, generator=torch.Generator().manual_seed(0)).triu(1) / size


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8)])
def test_no_column_waits_for_the_device(pattern: Pattern | None) -> None:
    """What asks a fake tensor for its values fails, as what asks a real one waits."""
    with fake_device() as (mode, _):
        factor = Factor(mode.from_tensor(upper(32)).to(CUDA), torch.zeros(32, dtype=torch.bool).to(CUDA), 0.01)
        found = sparsegpt([torch.randn(6, 32).to(CUDA), torch.randn(9, 32).to(CUDA)], factor, [0.5, 0.3], pattern, 16)
        assert [s.weight.shape for s in found] == [(6, 32), (9, 32)] and found[0].removed.device == CUDA
        with pytest.raises(DataDependentOutputException):  # control
            float(found[0].loss.sum())


def test_the_way_of_a_device_equals_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections that never look at counts, on real numbers with ties."""
    scores = torch.randint(0, 5, (40, 64), generator=torch.Generator().manual_seed(0)).float()
    wanted = [lowest(scores, 20), *(pattern_mask(scores, p) for p in (Pattern(2, 4), Pattern(5, 16), Pattern(7, 32)))]
    other = scores.as_subclass(Elsewhere)
    found = [lowest(other, 20), *(pattern_mask(other, p) for p in (Pattern(2, 4), Pattern(5, 16), Pattern(7, 32)))]
    assert all(torch.equal(a, b.as_subclass(Tensor)) for a, b in zip(wanted, found, strict=True))


class Elsewhere(Tensor):
    """A tensor in main memory that says it is not."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_copies_and_files_stay_what_they_were(name: str, tmp_path: Path) -> None:
    model, data = MODELS[name]()
    batch = data.calibration[0]
    with torch.no_grad():
        expected, before = model.logits(batch), weights(model)
        settle(model, CPU, visiting=True)
        twin = model.copy()
        assert model.device == CPU and twin.visited == CPU and same(weights(twin), before)
        assert torch.equal(model.logits(batch), expected) and torch.equal(twin.logits(batch), expected)
        settle(model, CPU)
        assert torch.equal(model.logits(batch), expected)


def test_what_changes_on_a_visit_is_brought_back_where_that_is_asked_for() -> None:
    module = nn.Linear(3, 2)
    home = module.weight
    for bring_back in (False, True):
        with visit(module, torch.device("meta"), bring_back=False):
            assert module.weight.device.type == "meta" and module.bias.device.type == "meta"
        assert module.weight is home and not home.is_meta, bring_back
    with pytest.raises(ValueError, match="stop here"), visit(module, torch.device("meta")):
        raise ValueError("stop here")
    assert module.weight is home


def test_gradients_reach_what_is_at_home() -> None:
    model, data = tiny_llama()
    settle(model, CPU, visiting=True)
    model.logits(data.calibration[0]).sum().backward()
    assert all(p.grad is not None for p in model.network.parameters())


def test_pruning_a_visiting_model_gives_the_same(tmp_path: Path) -> None:
    model, data = tiny_llama()
    plain = applied_to(Wanda(), model, data, tmp_path / "plain")
    settle(model, CPU, visiting=True)
    visiting = applied_to(Wanda(offload=True), model, data, tmp_path / "visiting")
    assert same(weights(plain.model), weights(visiting.model)) and plain.fingerprint == visiting.fingerprint
    assert visiting.model.visited == CPU and model.visited == CPU


def test_times_of_a_visiting_model_are_null_with_the_reason() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data: DataBundle = bundle_of(samples)
    settle(model, CPU, visiting=True)
    metrics = {"latency": Latency(), "throughput": Throughput(), "peak_memory": PeakMemory(), "loss": Loss()}
    found = {name: m for measured in evaluate([model, model], data, metrics) for name, m in measured[0].items()}
    for name in ("latency", "throughput", "peak_memory"):
        assert found[name].value is None and "prune.offload=true" in str(found[name].reason)
    assert found["loss"].value is not None


def test_a_run_with_offload_finds_the_same(small_config: Compose, tmp_path: Path) -> None:
    chosen = ("prune=wanda", "evals=[loss,nonzero_params,macs,latency]")
    plain, offloaded = (
        run(small_config(*chosen, f"prune.offload={flag}"), tmp_path / flag).to_json() for flag in ("false", "true")
    )
    for name in ("loss", "nonzero_params"):
        assert plain["pruned"][name]["value"] == offloaded["pruned"][name]["value"]
    assert plain["pruned"]["macs"]["value"] == offloaded["pruned"]["macs"]["value"]
    assert plain["pruned"]["latency"]["value"] and offloaded["pruned"]["latency"]["value"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_one_block_at_a_time_on_a_gpu(tmp_path: Path) -> None:
    model, data = tiny_llama()
    on_cpu = applied_to(Wanda(), model, data, tmp_path / "cpu")
    settle(model, CUDA, visiting=True)
    found = applied_to(Wanda(offload=True), model, data, tmp_path / "gpu")
    for name in model.blocks():
        for m in (model, found.model):
            assert {p.device for p in m.network.get_submodule(name).parameters()} == {CPU}
    zeros = [(a == 0).float().mean() for a in weights(on_cpu.model).values()]
    assert zeros == [(b == 0).float().mean() for b in weights(found.model).values()]
    with torch.no_grad():
        logits = found.model.logits(found.model.place(data.calibration[0]))
        assert logits.device == CUDA
        torch.testing.assert_close(logits.cpu(), on_cpu.model.logits(data.calibration[0]), rtol=1e-2, atol=1e-2)
