"""Synthetic token vectors whose answer sits in few tokens: the class that most signal tokens point to.

Every token is standard normal noise. `signals` of them, at random places, also carry a direction of length
`strength`: that of the label in all but `rivals` of them, other classes' in those. So the answer needs several of
the signal tokens, no other token says anything, and a signal token is longer than the others,
`sqrt(D + strength^2)` against `sqrt(D)`, which is what makes the L2 norm a score worth having here.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.base import Batch, DataBundle
from data.synthetic import synthetic_bundle
from utils.errors import InputError
from utils.rules import Count, NonNegative, Seed, Whole, checked


@checked
def signal_tokens(
    *,
    classes: Count = 4,
    tokens: Count = 128,
    token_width: Count = 512,
    signals: Count = 5,
    rivals: Whole = 2,
    strength: NonNegative = 24.0,
    train_samples: Count = 960,
    validation_samples: Count = 256,
    batch_size: Count = 16,
    calibration_batches: Whole = 4,
    calibration_batch_size: Count = 16,
    seed: Seed = 0,
) -> DataBundle:
    """Draw samples; chance is 1 / classes.

    Args:
        classes: Number of classes, at least 2 where there are rivals.
        tokens: Token vectors per sample, T.
        token_width: Length of each, D.
        signals: Tokens that carry a direction.
        rivals: Of these, the ones that carry another class's; fewer than half.
        strength: Length of a direction, in standard deviations of the noise.
        train_samples: Size of the training split.
        validation_samples: Size of the validation split.
        batch_size: Samples per training and validation batch.
        calibration_batches: Batches that scores and thresholds are computed on, drawn from train.
        calibration_batch_size: Samples in each; part of the definition of a score.
        seed: Seeds the samples, the order of training and the calibration sample.

    Raises:
        InputError: If the label would not be the majority, or tokens are too few.
    """
    if 2 * rivals >= signals:
        raise InputError(f"data.rivals={rivals}: must be fewer than half of data.signals={signals}")
    if signals > tokens:
        raise InputError(f"data.signals={signals}: must be at most data.tokens={tokens}")
    if rivals and classes < 2:
        raise InputError(f"data.classes={classes}: must be at least 2 where data.rivals={rivals}")
    generator = torch.Generator().manual_seed(seed)
    directions = strength * normalize(torch.randn(classes, token_width, generator=generator), dim=1)

    def draw(count: int) -> Batch:
        labels = torch.randint(classes, (count,), generator=generator)
        inputs = torch.randn(count, tokens, token_width, generator=generator)
        places = torch.rand(count, tokens, generator=generator).argsort(dim=1)[:, :signals]
        carried = directions[_classes(labels, classes, signals, rivals, generator)]  # (B, signals, D)
        inputs.scatter_add_(1, places[..., None].expand_as(carried), carried)
        return {"inputs": inputs, "labels": labels}

    train, validation = draw(train_samples), draw(validation_samples)
    return synthetic_bundle(
        "signal_tokens", classes, train, validation, batch_size=batch_size,
        calibration=(calibration_batches, calibration_batch_size), seed=seed,
    )  # fmt: skip


def _classes(labels: Tensor, classes: int, signals: int, rivals: int, generator: torch.Generator) -> Tensor:
    """The class that each signal token points to, (B, signals): the label's, and rivals' in the last ones."""
    own = labels[:, None].expand(-1, signals - rivals)
    if not rivals:
        return own
    away = torch.randint(1, classes, (len(labels), rivals), generator=generator)
    return torch.cat([own, (labels[:, None] + away) % classes], dim=1)
