"""Handwritten digits bundled with scikit-learn: 1,797 real 8x8 grey images, no download."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data.base import Batch, Classification, DataBundle, TensorBatches, fingerprint_of
from data.base import calibration_batches as calibration_sample
from utils.errors import InputError
from utils.rules import Count, Seed, Whole, checked

TRAIN_SAMPLES = 1200
SPLIT_SEED = 0


@checked
def digits(
    *,
    classes: Literal[10] = 10,
    image_size: Literal[8] = 8,
    batch_size: Count = 64,
    calibration_batches: Whole = 16,
    calibration_batch_size: Count = 64,
    shift: Whole = 0,
    seed: Seed = 0,
) -> DataBundle:
    """Load digits with a fixed stratified split: 1,200 train, 597 validation.

    Args:
        classes: Always 10; there for the model's configuration to refer to.
        image_size: Always 8, likewise.
        batch_size: Samples per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Samples in each; part of the definition of a score.
        shift: Largest random shift of training images in pixels.
        seed: Seeds the order of training and the calibration sample, not the split.
    """
    train, validation = _splits()
    calibration = calibration_sample(train, calibration_batches, calibration_batch_size, seed)
    return DataBundle(
        name="digits",
        domain="vision",
        task=Classification(10),
        calibration=calibration,
        train=TensorBatches(train, batch_size, shuffle_seed=seed, augment=partial(shifted, reach=shift)),
        train_samples=len(train["labels"]),
        validation=TensorBatches(validation, max(batch_size, 256)),
        example={"inputs": validation["inputs"][:1]},
        fingerprints={
            "train": fingerprint_of(*train.values(), batch_size, shift, seed),
            "calibration": fingerprint_of(*(t for batch in calibration for t in batch.values())),
            "validation": fingerprint_of(*validation.values(), batch_size),
        },
    )


def shifted(images: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Move each image by up to `reach` pixels along both axes; background moves in.

    Args:
        images: (B, 1, h, w), background -1.
        generator: Source of the shifts.
        reach: Largest shift in pixels.
    """
    if reach == 0:
        return images
    height, width = images.shape[-2:]
    padded = pad(images, (reach,) * 4, value=-1.0)[:, 0]  # (B, h + 2r, w + 2r)
    corner = torch.randint(0, 2 * reach + 1, (2, len(images), 1), generator=generator)
    row, column = corner[0] + torch.arange(height), corner[1] + torch.arange(width)  # (B, h), (B, w)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, row[:, :, None], column[:, None, :]][:, None]  # (B, 1, h, w)


def stratified_split(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` rows with the classes in proportion, and the others; both shuffled.

    The same draw as scikit-learn's `train_test_split(..., stratify=labels)`, whose import takes a
    second of every command.

    Args:
        labels: Classes 0, 1, ... of the rows, (N,).
        count: Rows in the first part.
        seed: Seeds the draw.
    """
    draw = np.random.RandomState(seed)
    sizes = np.bincount(labels)
    wanted = _proportional(sizes, count, draw)
    # also decides ties, so that the draws after it are the same
    _proportional(sizes - wanted, len(labels) - count, draw)
    members = [np.flatnonzero(labels == label)[draw.permutation(size)] for label, size in enumerate(sizes)]
    first = np.concatenate([rows[:n] for rows, n in zip(members, wanted, strict=True)])
    rest = np.concatenate([rows[n:] for rows, n in zip(members, wanted, strict=True)])
    return draw.permutation(first), draw.permutation(rest)


def _proportional(sizes: np.ndarray, count: int, draw: np.random.RandomState) -> np.ndarray:
    """Share `count` out in proportion to `sizes`, both (classes,): largest remainders first, ties drawn."""
    exact = sizes / sizes.sum() * count
    shares = np.floor(exact)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        left = int(count - shares.sum())
        if left == 0:
            break
        tied = np.flatnonzero(remainders == remainder)
        shares[draw.choice(tied, min(len(tied), left), replace=False)] += 1
    return shares.astype(int)


def bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) in 0..16 and labels (1797,), from scikit-learn's own file, without importing it.

    Raises:
        InputError: If scikit-learn is not installed, or without the file.
    """
    package = find_spec("sklearn")
    folders = (package and package.submodule_search_locations) or []
    path = next((p for f in folders if (p := Path(f) / "datasets" / "data" / "digits.csv.gz").is_file()), None)
    if path is None:
        raise InputError("data=digits: needs the file that scikit-learn brings along; pip install scikit-learn")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # (1797, 64 + 1)
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _splits() -> tuple[Batch, Batch]:
    images, labels = bundled_digits()
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0..16 -> -1..1
    rows = stratified_split(labels, TRAIN_SAMPLES, SPLIT_SEED)
    train, validation = (
        {"inputs": pixels[r], "labels": torch.from_numpy(labels)[r]} for r in map(torch.from_numpy, rows)
    )
    return train, validation
