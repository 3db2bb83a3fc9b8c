"""Synthetic token vectors of any shape: noise with a class direction hidden in every token.

For trying sizes and speeds without data. The labels are learnable, so an accuracy on it
means something; chance is 1 / classes.
"""

import torch

from data.base import Batch, DataBundle
from data.synthetic import synthetic_bundle
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
    return synthetic_bundle(
        "random_tokens", classes, train, validation, batch_size=batch_size,
        calibration=(calibration_batches, calibration_batch_size), seed=seed,
    )  # fmt: skip
