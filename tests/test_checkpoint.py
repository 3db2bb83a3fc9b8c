"""Saving a cut model and building it again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import Batch, PrunableModel
from models.checkpoint import load_weights, save_model
from models.toy_encoder import toy_encoder
from prune.surgery import cut
from tests.adapters import ADAPTERS
from tests.test_contract import logits, plans, random_plan
from utils.errors import InputError


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=list(ADAPTERS))
def test_reloaded_logits_are_bit_equal(adapter, tmp_path: Path) -> None:
    model, samples = adapter()
    for number, plan in enumerate(plans(model)):
        pruned = cut(model, plan)
        folder = save_model(pruned, tmp_path / f"model{number}")
        fresh, _ = adapter()
        reloaded = load_weights(fresh, str(folder))
        assert torch.equal(logits(reloaded, samples), logits(pruned, samples))
        assert all(torch.equal(reloaded.origin[name], units) for name, units in pruned.origin.items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PrunableModel, Batch]:
    model, samples = ADAPTERS["toy_images"]()
    pruned = cut(model, random_plan(model, 0))
    return save_model(pruned, tmp_path / "model"), pruned, samples


def load(folder: Path) -> PrunableModel:
    """Load with other sizes in the configuration than the checkpoint has: its own must win."""
    return toy_encoder(classes=3, image_size=4, width=8, heads=2, checkpoint=str(folder))


def test_the_checkpoint_knows_its_own_sizes(saved) -> None:
    folder, pruned, samples = saved
    assert torch.equal(logits(load(folder), samples), logits(pruned, samples))


def test_saving_again_replaces_the_folder(saved) -> None:
    folder, pruned, samples = saved
    (folder / "stray").write_text("left from before")
    save_model(pruned, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_bare_weights_file_loads_strictly(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    save_file(dict(model.network.state_dict()), tmp_path / "weights.safetensors")
    sizes: Any = dict(model.recipe.arguments)
    reloaded = toy_encoder(**sizes, checkpoint=str(tmp_path / "weights.safetensors"))
    assert torch.equal(logits(reloaded, samples), logits(model, samples))
    with pytest.raises(
        InputError, match=r"first difference at 'cls': the file has \(1, 1, 24\), the model \(1, 1, 48\)"
    ):
        toy_encoder(**sizes | {"width": 48}, checkpoint=str(tmp_path / "weights.safetensors"))


def damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{ not json")


def edited(**changes):
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, folder / "model.safetensors")


def dropped_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_weights, "model.safetensors is damaged"),
        (missing_weights, "model.safetensors is missing"),
        (missing_manifest, "first difference at .*the file has"),
        (no_json, "manifest.json is damaged"),
        (edited(format=99), "format 99 is not 1"),
        (edited(builder="os.system"), "was saved from os.system"),
        (edited(arguments={"width": 24, "hats": 1}), r"do not fit .*\['hats'\]"),
        (edited(arguments=[1]), "do not fit|damaged"),
        (edited(units={"blocks.0.heads": [1, 0]}), "must be ascending units"),
        (edited(units={"blocks.0.heads": [-1]}), "must be ascending units"),
        (edited(units={"blocks.0.heads": "all"}), "must be ascending units"),
        (edited(units={"blocks.0.heads": [0, 9]}), r"blocks.0.heads in manifest.json are damaged; .* in \[0, 4\)"),
        (edited(units={"blocks.7.heads": [0]}), "are damaged; the groups are blocks.0.heads"),
        (edited(units=[1, 2]), "are damaged"),
        (whole_numbers, "torch.int8"),
        (dropped_tensor, "first difference at 'norm.weight': the file has nothing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(saved, damage, message: str) -> None:
    folder, *_ = saved
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
