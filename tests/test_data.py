"""Data sources: splits, seeds, fingerprints; and the toy encoder really learns."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from data.base import TensorBatches
from data.digits import bundled_digits, digits, shifted, stratified_split
from data.random_tokens import random_tokens
from evals.accuracy import Accuracy
from evals.base import Subject
from models.pretrained import with_weights
from models.toy_encoder import toy_encoder
from utils.errors import InputError, RunError
from utils.seed import seed_everything
from utils.storage import Store
from utils.training import Training, fit


def test_digits_have_a_fixed_stratified_split() -> None:
    first, other = digits(seed=0), digits(seed=7)
    train = torch.cat([batch["inputs"] for batch in first.train])
    validation = torch.cat([batch["inputs"] for batch in first.validation])
    assert (len(train), len(validation)) == (1200, 597)
    assert train.shape[1:] == (1, 8, 8) and train.min() == -1 and train.max() == 1
    assert first.fingerprints["validation"] == other.fingerprints["validation"]
    assert first.fingerprints["calibration"] != other.fingerprints["calibration"]
    seen = {row.numpy().tobytes() for row in train}
    assert not any(row.numpy().tobytes() in seen for row in validation), "no image in both splits"
    labels = torch.cat([batch["labels"] for batch in first.validation]).bincount()
    assert labels.min() >= 57 and labels.max() <= 61


def test_the_bundled_file_is_read_as_scikit_learn_reads_it() -> None:
    images, labels = bundled_digits()
    expected, answers = load_digits(return_X_y=True)
    assert np.array_equal(images, expected) and np.array_equal(labels, answers)
    assert labels.dtype == np.int64, "cross-entropy takes no other"


@pytest.mark.parametrize("count", [10, 333, 1200, 1787])
def test_the_split_is_scikit_learns(count: int) -> None:
    several = [bundled_digits()[1], np.random.default_rng(0).integers(0, 10, 1797), np.repeat(range(10), 179)]
    for seed, labels in enumerate(several):  # equal classes: every remainder is a tie
        expected = train_test_split(np.arange(len(labels)), train_size=min(count, len(labels) - 10),
                                    stratify=labels, random_state=seed)  # fmt: skip
        found = stratified_split(labels, min(count, len(labels) - 10), seed)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert not np.array_equal(found[0], stratified_split(labels, len(found[0]), seed + 1)[0])


def test_digits_do_without_importing_scikit_learn() -> None:
    heavy = "{'sklearn', 'scipy', 'pandas'} & set(sys.modules)"
    code = f"import sys; from data.digits import digits; digits(); assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, timeout=60)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("data.digits.find_spec", lambda name: None)
    with pytest.raises(InputError, match="data=digits: .* pip install scikit-learn"):
        digits()


def test_calibration_comes_from_train_without_repeats() -> None:
    data = digits(calibration_batches=5, calibration_batch_size=40)
    assert [len(batch["labels"]) for batch in data.calibration] == [40] * 5
    train = {row.numpy().tobytes() for batch in data.train for row in batch["inputs"]}
    drawn = [row.numpy().tobytes() for batch in data.calibration for row in batch["inputs"]]
    assert set(drawn) <= train and len(set(drawn)) == len(drawn)


def test_epochs_are_shuffled_the_same_way_for_the_same_seed() -> None:
    def two_epochs(seed: int) -> list[torch.Tensor]:
        torch.rand(1)  # other random numbers must not matter
        train = digits(seed=seed).train
        epochs = []
        for epoch in (1, 2):
            train.set_epoch(epoch)
            epochs.append(torch.cat([batch["labels"] for batch in train]))
        return epochs

    first, again, other = two_epochs(0), two_epochs(0), two_epochs(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_shift_moves_background_in() -> None:
    image = torch.full((50, 1, 3, 3), -1.0)
    image[:, :, 1, 1] = 1
    moved = shifted(image, torch.Generator().manual_seed(0), reach=1)
    assert moved.shape == image.shape and (moved.sum(dim=(1, 2, 3)) == -7).all()
    assert len({row.argmax().item() for row in moved.flatten(1)}) == 9


def test_random_tokens_follow_their_shape() -> None:
    data = random_tokens(tokens=7, token_width=5, classes=3, train_samples=40, calibration_batch_size=5)
    batch = next(iter(data.train))
    assert batch["inputs"].shape[1:] == (7, 5) and int(batch["labels"].max()) <= 2


@pytest.mark.slow
def test_the_toy_encoder_reaches_97_percent_on_digits(tmp_path: Path) -> None:
    seed_everything(0)
    data, settings = digits(), Training()
    model, history = with_weights(toy_encoder(classes=10, image_size=8, training=settings), data, Store(tmp_path), 0)
    assert len(history) == settings.epochs
    accuracy = Accuracy().measure([Subject(model, data)])[0]["accuracy"].value
    assert accuracy is not None and accuracy >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_so_it_does_for_other_seeds(tmp_path: Path, seed: int) -> None:
    seed_everything(seed)
    data = digits(seed=seed)
    model, _ = with_weights(toy_encoder(classes=10, image_size=8, training=Training()), data, Store(tmp_path), seed)
    accuracy = Accuracy().measure([Subject(model, data)])[0]["accuracy"].value
    assert accuracy is not None and accuracy >= 0.97


def test_a_loss_that_is_not_finite_stops_training() -> None:
    network = torch.nn.Linear(2, 2)
    batches = TensorBatches({"inputs": torch.full((1, 2), float("nan")), "labels": torch.zeros(1)}, 1)
    with pytest.raises(RunError, match="the loss is nan in epoch 1"):
        fit(network, lambda b: network(b["inputs"]).sum(), batches, Training(epochs=1), dict)


def test_weight_decay_spares_norms_biases_and_positions() -> None:
    """With zero gradients only decay moves a weight."""
    model = toy_encoder(classes=10, image_size=8, width=8, heads=2, neurons=4, depth=1)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    settings = Training(epochs=1, weight_decay=1.0, learning_rate=0.1, warmup=0)
    zeros = TensorBatches({"inputs": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2)}, 1)
    fit(model.network, lambda b: model.network(b["inputs"]).sum() * 0, zeros, settings, dict)
    moved = {name for name, p in model.network.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in before.items() if name.endswith("weight") and p.ndim >= 2}


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="model.width=10: must be a multiple of model.heads=4"):
        toy_encoder(classes=10, image_size=8, width=10)
    with pytest.raises(InputError, match="give image_size for images, or both tokens and token_width"):
        toy_encoder(classes=10, tokens=4)
    with pytest.raises(InputError, match="classes=0 must be at least 1"):
        toy_encoder(classes=0, image_size=8)
