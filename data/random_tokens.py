"""Synthetic token vectors of any shape: noise with a class direction hidden in every token.

For trying sizes and speeds without data. The labels are learnable, so an accuracy on it
means something; chance is 1 / classes.
"""

import torch

from data.base import Batch, Classification, DataBundle, TensorBatches, fingerprint_of
from data.base import calibration_batches as calibration_sample
from utils.rules import Count, NonNegative, Seed, Whole, checked


@checked
def random_tokens(
    *,
    classes: Count = 10,
    tokens: Count = 32,
    token_width: Count = 64,
    train_samples: Count = 1024,
    validation_samples: Count = 512,
    signal: NonNegative = 0.1,
    batch_size: Count = 64,
    calibration_batches: Whole = 8,
    calibration_batch_size: Count = 64,
    seed: Seed = 0,
) -> DataBundle:
    """Draw `signal * direction(label) + standard normal noise` for every token.

    Args:
        classes: Number of classes.
        tokens: Token vectors per sample.
        token_width: Length of each.
        train_samples: Size of the training split.
        validation_samples: Size of the validation split.
        signal: Length of the class part of a token, in standard deviations of the noise.
        batch_size: Samples per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Samples in each; part of the definition of a score.
        seed: Seeds the samples, the order of training and the calibration sample.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, token_width, generator=generator)

    def draw(count: int) -> Batch:
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, tokens, token_width, generator=generator)
        return {"inputs": noise + signal * directions[labels][:, None], "labels": labels}

    train, validation = draw(train_samples), draw(validation_samples)
    calibration = calibration_sample(train, calibration_batches, calibration_batch_size, seed)
    return DataBundle(
        name="random_tokens",
        domain="synthetic",
        task=Classification(classes),
        calibration=calibration,
        train=TensorBatches(train, batch_size, shuffle_seed=seed),
        train_samples=train_samples,
        validation=TensorBatches(validation, batch_size),
        example={"inputs": validation["inputs"][:1]},
        fingerprints={
            "train": fingerprint_of(*train.values(), batch_size, seed),
            "calibration": fingerprint_of(*(t for batch in calibration for t in batch.values())),
            "validation": fingerprint_of(*validation.values(), batch_size),
        },
    )
