"""Small Mask2Formers for tests: four stages, shifted windows, maps that windows do not divide."""

from typing import Any

import torch
from torch import nn

from models.base import Batch
from models.mask2former import Mask2Former, mask2former
from models.mask2former_units import PREDICTOR
from tests.modules import CLASSES, stirred

IMAGE = (64, 96)
BACKBONE: dict[str, Any] = {
    "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 3,
    "mlp_ratio": 1.5, "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "backbone_config": BACKBONE, "feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32,
    "encoder_feedforward_dim": 12, "dim_feedforward": 14, "num_attention_heads": 4, "encoder_layers": 2,
    "decoder_layers": 4, "num_queries": 5,
}  # fmt: skip
# one layer of each kind is enough where every family is taken through everything
LEAST = {"backbone_config": BACKBONE | {"depths": [1, 2, 1, 1]}, "encoder_layers": 1, "decoder_layers": 2}


def small_mask2former(**changed: Any) -> Mask2Former:
    """A network whose weights are large enough for an error to show."""
    model = mask2former(classes=CLASSES, image_size=IMAGE, settings={**SETTINGS, **changed})
    stirred_answers(model.network)
    return model


def stirred_answers(network: nn.Module) -> None:
    """Random weights, and logits of order one, so that tolerances mean what they do elsewhere."""
    stirred(network)
    for name, factor in ((f"{PREDICTOR}.2.0", 0.03), ("class_predictor", 0.3)):
        last: Any = network.get_submodule(name)
        with torch.no_grad():
            last.weight.mul_(factor)
            last.bias.mul_(factor)


def images(samples: int = 3, size: tuple[int, int] = IMAGE) -> Batch:
    """Random images, with label maps at the size of the masks, some pixels ignored."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (samples, size[0] // 4, size[1] // 4), generator=generator)
    labels[:, :2] = 255
    return {"inputs": torch.randn(samples, 3, *size, generator=generator), "labels": labels}


def least_mask2former() -> tuple[Mask2Former, Batch]:
    """The fewest layers, on small images."""
    return small_mask2former(**LEAST), images(6, (32, 64))
