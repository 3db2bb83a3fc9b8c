"""Recovery by low-rank additions: only they are trained, they are merged, and what pruning removed stays removed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.base import TensorBatches
from main import run
from models.base import PrunableModel
from models.pretrained import validate
from prune.recovery.lora import INSTALL, Lora, masked_forward, target_linears
from prune.surgery import cut
from prune.weights.magnitude import WeightMagnitude
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.sparse import applied_to
from tests.test_contract import random_plan
from utils.errors import InputError
from utils.storage import Store

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed (requirements-lora.txt)"
)
NO_LINEARS = ("conv", "resnet", "fused", "grouped")  # in the blocks that these name
FAMILIES = [name for name in ADAPTERS if not name.startswith(NO_LINEARS)]


def weights(model: PrunableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def changed(before: PrunableModel, after: PrunableModel) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys(), "the merged network has the names of the pruned one"
    return {name for name in old if not torch.equal(old[name], new[name])}


@needs_peft
@pytest.mark.parametrize("name", FAMILIES)
def test_only_linears_of_blocks_move_and_nothing_of_peft_is_left(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    names = target_linears(pruned, None)
    linears = [pruned.network.get_submodule(n) for n in names]
    way = Lora(epochs=2, rank=2, learning_rate=0.05)
    before = weights(pruned)
    done = way.recover(pruned, model, data, Store(tmp_path), seed=0)
    assert all(torch.equal(tensor, before[n]) for n, tensor in weights(pruned).items())
    moved = changed(pruned, done.model)
    assert moved and moved <= {f"{n}.weight" for n in names}
    expected = sum(2 * sum(m.weight.shape) for m in linears if isinstance(m, nn.Linear))
    assert done.facts["trainable_params"] == expected and done.facts["seconds"] > 0
    assert not any("lora" in type(module).__module__ for module in done.model.network.modules())
    assert all(p.requires_grad for p in done.model.network.parameters())
    again = way.recover(pruned, model, data, Store(tmp_path), seed=0)
    assert not changed(done.model, again.model) and again.history == done.history


@needs_peft
def test_the_merged_model_is_the_trained_one(tmp_path: Path) -> None:
    """The last validation loss was measured before merging; it is that of the merged model."""
    model, samples = ADAPTERS["llama"]()
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    done = Lora(epochs=3, rank=4, learning_rate=0.05).recover(pruned, model, data, Store(tmp_path), seed=0)
    after = validate(done.model, data)
    assert after["validation_loss"] == pytest.approx(done.history[-1]["validation_loss"], rel=1e-5)
    assert after["validation_loss"] != pytest.approx(done.history[0]["validation_loss"], rel=1e-3)


@needs_peft
@pytest.mark.parametrize("name", ["llama", "bert", "deit", "toy_images"])
def test_zeros_stay_and_the_mask_acts_in_training(name: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    data = bundle_of(samples)
    sparse = applied_to(WeightMagnitude(ratio=0.5), model, data, tmp_path / "p").model
    done = Lora(epochs=2, rank=3, learning_rate=0.05).recover(sparse, model, data, Store(tmp_path / "r"), seed=0)
    moved = changed(sparse, done.model)
    assert moved
    for matrix in target_linears(sparse, None):
        before = sparse.network.get_parameter(f"{matrix}.weight") == 0
        after = done.model.network.get_parameter(f"{matrix}.weight") == 0
        assert bool(before.any()) and bool((after | ~before).all()), f"{matrix} has lost zeros"
    assert validate(done.model, data)["validation_loss"] == pytest.approx(done.history[-1]["validation_loss"], rel=1e-5)


@needs_peft
def test_zeros_of_a_sparse_checkpoint_stay(tmp_path: Path) -> None:
    """Nothing is pruned in this run: that the model is sparse is known from its checkpoint alone."""
    model, samples = ADAPTERS["llama"]()
    data = bundle_of(samples)
    sparse = applied_to(WeightMagnitude(ratio=0.5), model, data, tmp_path / "p").model
    sparse.sparse = True
    done = Lora(epochs=1, rank=3, learning_rate=0.05).recover(sparse, sparse, data, Store(tmp_path / "r"), seed=0)
    assert changed(sparse, done.model)
    for matrix in target_linears(sparse, None):
        before, after = (m.network.get_parameter(f"{matrix}.weight") == 0 for m in (sparse, done.model))
        assert torch.equal(before, after)


@needs_peft
def test_targets_choose(tmp_path: Path) -> None:
    model, samples = ADAPTERS["llama"]()
    way = Lora(epochs=1, learning_rate=0.05, targets=("*.q_proj", "model.layers.1.mlp.*"))
    done = way.recover(model, model, bundle_of(samples), Store(tmp_path), seed=0)
    linears = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    linears |= {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert changed(model, done.model) == linears


class Killed(TensorBatches):
    """Training data whose third epoch never comes."""

    def set_epoch(self, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        super().set_epoch(epoch)


@needs_peft
def test_a_killed_one_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    model, samples = ADAPTERS["llama"]()
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    way = Lora(epochs=4, learning_rate=0.05, dropout=0.2)
    through = way.recover(pruned, model, data, Store(tmp_path / "through"), seed=5)
    doomed = type(data)(**{**vars(data), "train": Killed(samples, batch_size=2, shuffle_seed=0)})
    with pytest.raises(KeyboardInterrupt):
        way.recover(pruned, model, doomed, Store(tmp_path / "killed"), seed=5)
    assert list((tmp_path / "killed").rglob("*.partial"))
    resumed = way.recover(pruned, model, data, Store(tmp_path / "killed"), seed=5)
    assert resumed.history == through.history and not changed(through.model, resumed.model)
    other = way.recover(pruned, model, data, Store(tmp_path / "other"), seed=6)
    assert changed(through.model, other.model), "another seed draws other additions"


@needs_peft
def test_the_masked_forward_is_that_of_the_masked_weight() -> None:
    from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found]

    torch.manual_seed(0)
    network = nn.Sequential(base := nn.Linear(6, 5))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), network)
    layer: Any = network[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    kept, x = torch.rand(5, 6) > 0.5, torch.randn(4, 6)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = nn.functional.linear(x, base.weight + 1.5 * product * kept, base.bias)
    assert torch.allclose(masked_forward(layer, kept)(x), wanted, atol=1e-6)
    assert not torch.allclose(layer(x), wanted, atol=1e-3)


@needs_peft
def test_what_can_not_be_added_to_is_refused(tmp_path: Path) -> None:
    model, samples = ADAPTERS["resnet_basic"]()
    with pytest.raises(InputError, match="has no linear in its blocks"):
        Lora(epochs=1).recover(model, model, bundle_of(samples), Store(tmp_path), 0)
    other, _ = ADAPTERS["llama"]()
    with pytest.raises(InputError, match="'nothing' matches no linear; there are model.layers.0"):
        target_linears(other, ("nothing",))
    with pytest.raises(InputError, match="recover.targets"):
        Lora(targets=())
    with pytest.raises(InputError, match="rank"):
        Lora(rank=0)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        Lora()
    assert str(error.value) == INSTALL and "\n" not in INSTALL and "pip install" in INSTALL


@needs_peft
def test_a_run_records_it(small_config: Compose, tmp_path: Path) -> None:
    overrides = ("recover=lora", "recover.epochs=2", "recover.rank=2", "prune.ratio=0.3", "evals=[accuracy]")
    record = run(small_config(*overrides), tmp_path)
    found = record.to_json()["recovery"]
    assert found["method"] == "lora" and found["trainable_params"] > 0 and found["seconds"] > 0
    assert "trained parameters" in (tmp_path / "report.md").read_text()
    assert record.pruned["accuracy"].value == pytest.approx(found["history"][-1]["validation_accuracy"], abs=1e-6)
