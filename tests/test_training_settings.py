"""Recovery at full size: augmentation, early stopping, checkpointing, teachers, losses that break."""

import copy
from pathlib import Path

import pytest
import torch

from data.base import DataBundle, TensorBatches, divided_rows
from models.base import PrunableModel
from models.checkpoint import save_model
from models.vit import vit
from prune.recovery.augment import Augmentation, augmented, by_policy
from prune.recovery.base import TrainedRecovery
from prune.recovery.checkpointing import checkpointed
from prune.recovery.distill import Distill
from prune.recovery.finetune import Finetune
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of, timm_vit
from tests.test_contract import random_plan
from utils.errors import InputError
from utils.seed import seed_everything
from utils.storage import Store


def toy(name: str = "deit") -> tuple[PrunableModel, DataBundle]:
    model, samples = ADAPTERS[name]()
    return model, bundle_of(samples)


def recovered(way: TrainedRecovery, model: PrunableModel, data: DataBundle, store: Path):
    return way.recover(cut(model, random_plan(model, 0)), model, data, Store(store), 0)


def same(first: PrunableModel, second: PrunableModel) -> bool:
    pairs = zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("count", [2, 7, 100])
def test_held_out_rows_are_apart_and_always_the_same(count: int) -> None:
    rest, held = divided_rows(count, 0.1, 0)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(count)) and len(held) == max(1, round(0.1 * count))
    assert torch.equal(divided_rows(count, 0.1, 0)[1], held)


@pytest.mark.parametrize("name", ["deit", "bert"])
def test_early_stopping_looks_at_held_out_training_samples(name: str, tmp_path: Path) -> None:
    model, data = toy(name)
    way = Finetune(epochs=30, patience=2, holdout=0.34, learning_rate=0.05)
    done = recovered(way, model, data, tmp_path)
    losses = [row["held_out_loss"] for row in done.history[1:]]
    best = 1 + losses.index(min(losses))
    assert len(losses) == best + 2 < 30 and done.facts["used_epoch"] == done.facts["best_epoch"] == best
    assert "no epoch after" in done.notes[0] and done.facts["samples_seen"] == 4 * len(losses)
    other = [{k: t.flip(0) if k == "labels" else t for k, t in batch.items()} for batch in data.validation]
    again = recovered(way, model, type(data)(**{**vars(data), "validation": other}), tmp_path / "other")
    assert same(again.model, done.model), "the validation split has a say"
    with pytest.raises(InputError, match="can't be divided"):
        recovered(way, model, type(data)(**{**vars(data), "train": [1]}), tmp_path / "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["deit", "llama", "resnet_basic", "bert"])
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    model, data = toy(name)
    batch, runs = data.calibration[0], []
    block = model.network.get_submodule(model.blocks()[0])
    gradients = []
    for again in (False, True):
        model.network.zero_grad()
        inner = next(iter(block.children()))
        hook = inner.register_forward_pre_hook(lambda *_: runs.append(1))
        if again:
            with checkpointed(model):
                data.task.loss(model.logits(batch), batch).backward()
        else:
            data.task.loss(model.logits(batch), batch).backward()
        hook.remove()
        gradients.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain)
    assert len(runs) == 3, "once without, twice with checkpointing"
    assert not any("forward" in vars(module) for module in model.network.modules())


def test_mixing_changes_images_and_softens_labels() -> None:
    model, data = toy()
    seed_everything(0)
    (first, *others) = augmented(data.train, Augmentation(mixup=1.0), data, model)
    assert first["labels"].shape == (2, 7) and first["labels"].is_floating_point()
    torch.testing.assert_close(first["labels"].sum(dim=1), torch.ones(2))
    assert torch.isfinite(data.task.loss(model.logits(first), first, 0.1)) and len(others) == 2
    plain = next(iter(data.train))
    assert not torch.equal(first["inputs"], plain["inputs"])
    assert augmented(data.train, Augmentation(), data, model) is data.train


def test_an_odd_batch_keeps_its_last_image() -> None:
    model, data = toy()
    odd = TensorBatches({name: tensor[:3] for name, tensor in data.train.tensors.items()}, 3)  # type: ignore[attr-defined]
    (found,) = augmented(odd, Augmentation(cutmix=1.0), data, model)
    assert torch.equal(found["inputs"][2], odd.tensors["inputs"][2]) and found["labels"][2].max() == 1


def test_policies_keep_shape_and_range() -> None:
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    assert torch.allclose(by_policy(images, lambda image: image), images, atol=0.01)
    model, data = toy()
    for policy in ("rand-m9-mstd0.5-inc1", "original"):
        (first, *_) = augmented(data.train, Augmentation(policy, erase=0.5), data, model)
        assert first["inputs"].shape == (2, 3, 16, 16) and bool(torch.isfinite(first["inputs"]).all())


@pytest.mark.parametrize("settings", [{"augment": "rand-m5"}, {"mixup": 0.3, "erase": 0.5, "cutmix": 0.2}])
def test_augmented_recovery_is_the_same_twice(settings: dict, tmp_path: Path) -> None:
    model, data = toy()
    way, plain = Finetune(epochs=2, **settings), Finetune(epochs=2)
    first, second, third = (recovered(w, model, data, tmp_path / f"{i}") for i, w in enumerate((way, way, plain)))
    assert same(first.model, second.model) and not same(first.model, third.model)


@pytest.mark.parametrize(
    ("way", "match"),
    [
        (Finetune(epochs=1, augment="nonsense-m3"), "timm has no such policy"),
        (Finetune(epochs=1, optimizer="adamm"), "did you mean"),
        (Finetune(epochs=1, optimizer="adahessian"), "second derivatives"),
    ],
)
def test_bad_settings_are_named(way: TrainedRecovery, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        recovered(way, *toy(), tmp_path)


def test_texts_are_not_augmented_and_hand_made_blocks_not_checkpointed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have images"):
        recovered(Finetune(epochs=1, mixup=0.2), *toy("bert"), tmp_path)
    with pytest.raises(InputError, match="has no blocks"):
        recovered(Finetune(epochs=1, grad_checkpointing=True), *toy("conv"), tmp_path)


class Poisoned(TensorBatches):
    """Training data that is NaN in one epoch."""

    bad = 3

    def __iter__(self):
        for batch in super().__iter__():
            yield {**batch, "inputs": batch["inputs"] * (float("nan") if self.epoch == self.bad else 1)}


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_nan_loss_keeps_the_last_good_epoch_and_says_so(average: float, tmp_path: Path) -> None:
    model, data = toy()
    poisoned = copy.copy(data.train)
    poisoned.__class__ = Poisoned
    way = Finetune(epochs=6, average=average)
    done = recovered(way, model, type(data)(**{**vars(data), "train": poisoned}), tmp_path / "a")
    assert done.facts["epochs"] == done.facts["used_epoch"] == 2 and len(done.history) == 3
    assert "loss is nan in epoch 3" in done.notes[0] and "weights after epoch 2" in done.notes[0]
    assert all(bool(torch.isfinite(p).all()) for p in done.model.network.parameters())


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, data = toy()
    other, _ = timm_vit("deit_tiny_patch16_224", depth=3)
    deep = str(save_model(other, tmp_path / "deep"))
    text = str(save_model(ADAPTERS["bert"]()[0], tmp_path / "text"))
    wide = str(save_model(timm_vit("deit_tiny_patch16_224", embed_dim=32)[0], tmp_path / "wide"))
    few = vit(name="deit_tiny_patch16_224", classes=3, image_size=16,
              settings={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4})  # fmt: skip
    three = str(save_model(few, tmp_path / "three"))
    for way, match in (
        (Distill(epochs=1, teacher=three), r"its logits have shape \(1, 3\), those of the pruned model \(1, 7\)"),
        (Distill(epochs=1, teacher=wide, features=1.0), "with recover.features=0 only logits are compared"),
        (Distill(epochs=1, teacher=text), "cannot run on data"),
    ):
        with pytest.raises(InputError, match=match):
            recovered(way, model, data, tmp_path / "s")
    done = recovered(Distill(epochs=1, teacher=deep), model, data, tmp_path / "s")
    assert not same(done.model, recovered(Distill(epochs=1), model, data, tmp_path / "s").model)
