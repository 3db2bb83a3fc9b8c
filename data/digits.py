"""Handwritten digits bundled with scikit-learn: 1,797 real 8x8 grey images, no download."""

from functools import partial
from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import pad

from data.base import Batch, Classification, DataBundle, TensorBatches, fingerprint_of
from data.base import calibration_batches as calibration_sample
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


def _splits() -> tuple[Batch, Batch]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0..16 -> -1..1
    rows = train_test_split(
        torch.arange(len(labels)).numpy(), train_size=TRAIN_SAMPLES, stratify=labels, random_state=SPLIT_SEED
    )
    answers = torch.tensor(labels, dtype=torch.int64)
    train, validation = ({"inputs": pixels[r], "labels": answers[r]} for r in map(torch.from_numpy, rows))
    return train, validation
