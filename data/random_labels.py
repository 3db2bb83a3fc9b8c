"""The ancestor's data: uniform token vectors with labels that have nothing to do with them.

Nothing can be learnt here; accuracy is chance, 1 / classes. Only for reproducing figures that depend on shapes.
"""

import torch

from data.base import Batch, DataBundle
from data.synthetic import synthetic_bundle
from utils.rules import Count, Seed, Whole, checked

NOTE = "The labels are random: accuracy can only be chance, whatever the model."


@checked
def random_labels(
    *,
    classes: Count = 2,
    tokens: Count = 128,
    token_width: Count = 512,
    train_samples: Count = 1000,
    validation_samples: Count = 200,
    batch_size: Count = 16,
    calibration_batches: Whole = 1,
    calibration_batch_size: Count = 16,
    seed: Seed = 0,
) -> DataBundle:
    """Draw U[0, 1] token vectors; the first validation batch is `torch.rand(B, T, D)` after `torch.manual_seed(seed)`.

    Args:
        classes: Number of classes, chosen with equal chances.
        tokens: Token vectors per sample, T.
        token_width: Length of each, D.
        train_samples: Size of the training split.
        validation_samples: Size of the validation split.
        batch_size: Samples per training and validation batch, B.
        calibration_batches: Batches for methods that calibrate, drawn from train.
        calibration_batch_size: Samples in each.
        seed: Seeds the samples, the order of training and the calibration sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Batch:
        inputs = torch.rand(count, tokens, token_width, generator=generator)
        return {"inputs": inputs, "labels": torch.randint(classes, (count,), generator=generator)}

    validation, train = draw(validation_samples), draw(train_samples)
    return synthetic_bundle(
        "random_labels", classes, train, validation, batch_size=batch_size,
        calibration=(calibration_batches, calibration_batch_size), seed=seed, notes=(NOTE,),
    )  # fmt: skip
