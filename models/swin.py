"""Swin transformers from timm: heads and neurons of blocks in stages, attention inside shifted windows."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from models.base import Recipe
from models.timm_family import DERIVED, Family, TimmFamily
from models.timm_models import assembled
from utils.rules import Count, ExistingPath, checked
from utils.training import Training

WINDOWS = "its windows need every token at its place on the grid"

SWIN = (
    Family(SwinTransformer, blocks="layers.*.blocks.*", final=("norm",), feature_axis=-1, tokens=WINDOWS),
    # its norms lie behind the attention, so that the outputs of the blocks are the trajectory
    Family(
        SwinTransformerV2, blocks="layers.*.blocks.*", point=None, final=("norm",), feature_axis=-1, tokens=WINDOWS
    ),
)  # fmt: skip


@checked
def swin(
    *,
    name: str,
    classes: Count | None = None,
    image_size: Count | None = None,
    pretrained: bool = False,
    checkpoint: ExistingPath | None = None,
    new_head: bool = False,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> TimmFamily:
    """Build any of timm's Swin transformers, S3 and SwinV2 included.

    Args:
        name: timm's name, such as `swin_tiny_patch4_window7_224`.
        classes: Width of the classifier; None takes the architecture's own.
        image_size: Side of the images in pixels; None takes the architecture's own.
        pretrained: Take the weights that timm publishes under the name, from the hub.
        checkpoint: A `.safetensors` or `.pth` file, or a folder; wins over `pretrained`.
        new_head: Put a fresh classifier on the loaded weights and train on first use.
        settings: Further arguments of timm's model, such as `window_size`.
        training: How to train where the weights are not complete.

    Raises:
        InputError: If timm does not know the name, a block can't be cut exactly, or
            weights are missing or don't fit.
    """
    arguments = {"name": name, "classes": classes, "image_size": image_size, "settings": dict(settings or {})}
    return assembled(
        partial(TimmFamily, families=SWIN), Recipe("models.swin.swin", arguments, exact_name=True),
        pretrained=pretrained, checkpoint=checkpoint, new_head=new_head, training=training, derived=DERIVED,
    )  # fmt: skip
