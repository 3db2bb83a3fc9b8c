"""A checkpoint that pare saved as sparse keeps its zeros when it is trained later."""

import json
from pathlib import Path

import pytest
import torch

from main import run
from models.base import PrunableModel
from models.checkpoint import load_weights, save_model
from prune.none import Nothing
from prune.recovery.finetune import Finetune
from prune.recovery.zeros import kept_zeros, sparse_weights
from prune.rewriting import applied
from prune.surgery import cut
from prune.weights.magnitude import WeightMagnitude
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.sparse import linear
from tests.test_contract import random_plan
from utils.storage import Store


def sparse(name: str, tmp_path: Path) -> tuple[PrunableModel, dict]:
    """A model with half its weights zero."""
    model, samples = ADAPTERS[name]()
    data, method = bundle_of(samples), WeightMagnitude()
    return applied(method, model, method.plan(model, None, None), data, Store(tmp_path)).model, samples  # type: ignore[arg-type]


def reloaded(model: PrunableModel, name: str, folder: Path) -> PrunableModel:
    return load_weights(ADAPTERS[name]()[0], str(save_model(model, folder)))


def zeros(model: PrunableModel, names: frozenset[str]) -> dict[str, torch.Tensor]:
    return {name: model.network.get_parameter(name).detach() == 0 for name in names}


@pytest.mark.parametrize("name", ["toy_images", "llama", "bert", "deit"])
def test_zeros_survive_saving_loading_and_training(name: str, tmp_path: Path) -> None:
    pruned, samples = sparse(name, tmp_path)
    model, data = reloaded(pruned, name, tmp_path / "model"), bundle_of(samples)
    assert model.sparse and json.loads((tmp_path / "model" / "manifest.json").read_text())["sparse"] is True
    start = applied(Nothing(), model, Nothing().plan(model, None, None), data, Store(tmp_path)).model  # type: ignore[arg-type]
    done = Finetune(epochs=2).recover(start, model, data, Store(tmp_path), seed=0).model
    names = sparse_weights(model)
    before, after = zeros(model, names), zeros(done, names)
    assert names and sum(int(zero.sum()) for zero in before.values()) > 0
    for key, zero in before.items():
        assert bool(after[key][zero].all()), key
        assert not torch.equal(done.network.get_parameter(key), model.network.get_parameter(key)), "it was trained"
    assert reloaded(done, name, tmp_path / "again").sparse, "and what is saved then is sparse again"


def test_without_the_mark_zeros_are_trained_away(tmp_path: Path) -> None:
    pruned, samples = sparse("toy_images", tmp_path)
    model = reloaded(pruned, "toy_images", tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    del manifest["sparse"]  # a folder from before zeros were marked
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    unmarked = load_weights(ADAPTERS["toy_images"]()[0], str(tmp_path / "model"))
    assert not unmarked.sparse and sparse_weights(unmarked) == frozenset()
    done = Finetune(epochs=2).recover(unmarked, unmarked, bundle_of(samples), Store(tmp_path), seed=0).model
    names = sparse_weights(model)
    assert sum(int(zero.sum()) for zero in zeros(done, names).values()) == 0


def test_the_mark_is_part_of_what_recovery_is_kept_under(tmp_path: Path) -> None:
    pruned, samples = sparse("toy_images", tmp_path)
    data, way, store = bundle_of(samples), Finetune(epochs=2), Store(tmp_path)
    free = pruned.copy()
    free.sparse = False
    moved = way.recover(free, free, data, store, seed=0).model
    kept = way.recover(pruned, pruned, data, store, seed=0).model
    names = sparse_weights(pruned)
    assert (
        sum(int(z.sum()) for z in zeros(kept, names).values())
        > 0
        == sum(int(z.sum()) for z in zeros(moved, names).values())
    )


def test_cutting_a_sparse_model_keeps_what_zeros_are_left(tmp_path: Path) -> None:
    pruned, samples = sparse("toy_images", tmp_path)
    smaller = cut(pruned, random_plan(pruned, 0))
    names = sparse_weights(smaller)
    found = kept_zeros(smaller.network, pruned.network, names)
    assert smaller.sparse and found.keys() == {name for name, zero in zeros(smaller, names).items() if zero.any()}
    assert kept_zeros(smaller.network, pruned.network).keys() < found.keys(), "shapes differ, so these need the mark"


def test_dense_models_and_fresh_heads_may_move() -> None:
    model, _ = ADAPTERS["toy_images"]()
    with torch.no_grad():
        model.network.get_parameter("head.weight").zero_()
        linear(model, "blocks.0.fc1").weight[0] = 0
    assert sparse_weights(model) == frozenset() and kept_zeros(model.network, model.network) == {}
    model.sparse = True
    assert kept_zeros(model.network, model.network, sparse_weights(model)).keys() == {"blocks.0.fc1.weight"}


def test_a_run_on_a_sparse_checkpoint_keeps_its_zeros(small_config: Compose, tmp_path: Path) -> None:
    first = run(
        small_config("prune=weight_magnitude", "prune.ratio=0.6", "save=true", "evals=[nonzero_params]"), tmp_path / "a"
    )
    wanted = first.pruned["nonzero_params"].value
    again = ("prune=none", f"model.checkpoint={tmp_path}/a/model", "recover=finetune", "recover.epochs=1")
    found = run(small_config(*again, "evals=[nonzero_params]"), tmp_path / "b").pruned["nonzero_params"].value
    assert found is not None and wanted is not None and found <= wanted < first.dense["nonzero_params"].value  # type: ignore[operator]
