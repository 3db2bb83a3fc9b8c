"""Every adapter that the contract tests cover: a model with a batch; a new family is one line."""

from collections.abc import Callable

import torch

from data.base import Classification, DataBundle, TensorBatches
from models.base import Batch, PrunableModel
from models.toy_encoder import toy_encoder
from tests.modules import CLASSES, TOKENS, WIDTH, conv_model, fused_model, grouped_model, stirred

Adapter = Callable[[], tuple[PrunableModel, Batch]]


def batch(*shape: int, samples: int = 6, classes: int = CLASSES) -> Batch:
    """Random inputs of a shape, with labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (samples,), generator=generator)
    return {"inputs": torch.randn(samples, *shape, generator=generator), "labels": labels}


def toy_on_images() -> tuple[PrunableModel, Batch]:
    """Two layers on 8x8 images; weights large enough for an error to show."""
    model = toy_encoder(classes=CLASSES, image_size=8, width=24, depth=2, heads=4, neurons=20)
    stirred(model.network)
    return model, batch(1, 8, 8)


def toy_on_tokens() -> tuple[PrunableModel, Batch]:
    """Two layers on given token vectors."""
    model = toy_encoder(classes=CLASSES, tokens=6, token_width=9, width=24, depth=2, heads=3, neurons=16)
    stirred(model.network)
    return model, batch(6, 9)


ADAPTERS: dict[str, Adapter] = {
    "toy_images": toy_on_images,
    "toy_tokens": toy_on_tokens,
    "fused_qkv": lambda: (fused_model(), batch(TOKENS, WIDTH)),
    "grouped_query": lambda: (grouped_model(), batch(TOKENS, WIDTH)),
    "conv": lambda: (conv_model(), batch(4, 6, 6)),
}


def bundle_of(samples: Batch, batches: int = 3) -> DataBundle:
    """A data set of one batch, split for calibration."""
    parts = [
        dict(zip(samples, rows, strict=True))
        for rows in zip(*(t.tensor_split(batches) for t in samples.values()), strict=True)
    ]
    return DataBundle(
        name="handmade",
        domain="synthetic",
        task=Classification(CLASSES),
        calibration=parts,
        train=TensorBatches(samples, batch_size=2, shuffle_seed=0),
        train_samples=len(samples["labels"]),
        validation=parts,
        example={name: tensor[:1] for name, tensor in samples.items()},
        fingerprints={"train": "t", "calibration": "c", "validation": "v"},
    )
