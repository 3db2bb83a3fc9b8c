"""Mask2Former from transformers: segmentation by queries, with a Swin backbone (Cheng et al., arXiv:2112.01527)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import mask2former_decoder, mask2former_units, swin_backbone
from models.base import Batch, Products, PrunableModel, Recipe, UnitGroup
from models.checkpoint import MANIFEST, load_weights, stored_recipe
from models.hf import plain_config, write_stock
from models.mask2former_names import from_published, to_published
from models.mask2former_network import KIND, PROCESSOR_FILE, STRIDE, built, images_of, loaded, processor_of
from models.mask2former_units import all_groups, backbone_blocks, decoder_layers, mask_products, pixel_layers
from models.settings import refuse_unknown_settings
from utils.errors import InputError
from utils.rules import Count, ExistingPath, checked
from utils.training import Training


class Mask2Former(PrunableModel):
    """Heads and neurons of the backbone, of the pixel decoder, and of the decoder of queries.

    What a block gives is read beyond the next one: the pixel decoder reads the last block of every stage, and every
    decoder layer leaves a mask for the next.

    Attributes:
        processor: Settings of the image processor that came with the weights, in transformers' terms.
    """

    code = (swin_backbone, mask2former_decoder, mask2former_units)
    chained = False
    fixed_blocks = "they lie in three networks, whose maps and masks are read beyond the next block"

    def __init__(self, network: nn.Module, recipe: Recipe, training: Training | None = None) -> None:
        super().__init__(network, recipe, training)
        self.processor: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """The name of the hub or of the folder it came from, without what leads there."""
        return str(self.recipe.arguments["name"] or "mask2former").split("/")[-1]

    @property
    def attention(self) -> str:
        """Transformers' name of what the backbone computes attention by."""
        return str(self.network.config.backbone_config._attn_implementation)  # type: ignore[union-attr]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """Heads and neurons of all layers; a decoder layer has heads that look at pixels and heads among queries."""
        return all_groups(self.network)

    def blocks(self) -> tuple[str, ...]:
        """Blocks of the backbone stage by stage, layers of the pixel decoder, layers of the decoder."""
        return (*backbone_blocks(self.network), *pixel_layers(self.network), *decoder_layers(self.network))

    def feature_points(self) -> tuple[str, ...]:
        """First norm of each backbone block, last norm of the other layers (before it comes last: its neurons' sum)."""
        last = "fc2" if self.network.config.pre_norm else "final_layer_norm"  # type: ignore[union-attr]
        return (
            *(f"{block}.layernorm_before" for block in backbone_blocks(self.network)),
            *(f"{layer}.final_layer_norm" for layer in pixel_layers(self.network)),
            *(f"{layer}.{last}" for layer in decoder_layers(self.network)),
        )

    def logits(self, batch: Batch) -> Tensor:
        """Per query the logits of its class, the last "no object", then of its mask's pixels; (B, Q, C + 1 + h * w).

        A mask is a quarter of the image high and wide.
        """
        # what the class is read from is only handed on together with all hidden states
        found = self.network(batch["inputs"], output_hidden_states=True)
        return torch.cat([found.class_queries_logits, found.masks_queries_logits.flatten(2)], dim=-1)

    def whole_products(self) -> tuple[Products, ...]:
        """The masks: a product of every query with every pixel."""
        return (mask_products(self.network),)

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names of the published checkpoints."""
        return to_published(tensors)

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint under the network's own names."""
        return from_published(tensors)

    def stock_files(self, folder: Path) -> str | None:
        """Transformers can express one number of neurons for each of the three networks, and every head."""
        height, width = self.preprocessing.input_size[1:]
        images = {
            "image_processor_type": "Mask2FormerImageProcessor",
            "image_mean": list(self.preprocessing.mean),
            "image_std": list(self.preprocessing.std),
            **self.processor,
            "size": {"height": height, "width": width},
        }
        (folder / PROCESSOR_FILE).write_text(json.dumps(images, indent=1), encoding="utf-8")
        if any(group.count != self.dense_counts[group.name] for group in self.unit_groups() if group.kind == "head"):
            return "transformers ties the width of a head to the number of heads, which must divide the model's width"
        sizes = self._sizes()
        if isinstance(sizes, str):
            return sizes
        write_stock(self, folder, sizes)
        return None

    def _sizes(self) -> dict[str, Any] | str:
        """The configuration's words for the numbers of neurons, or why it has none."""
        counts = {group.name: group.count for group in self.unit_groups() if group.kind == "neuron"}

        def of(layers: Sequence[str]) -> list[int]:
            return [counts[f"{layer}.neurons"] for layer in layers]

        pixels, queries = of(pixel_layers(self.network)), of(decoder_layers(self.network))
        blocks = backbone_blocks(self.network)
        widths = [int(self.network.get_submodule(f"{block}.mlp.fc1").in_features) for block in blocks]  # type: ignore[arg-type]
        found = of(blocks)
        # half a neuron more, so that transformers' int() of the product never falls one short
        ratio = min((count + 0.5) / width for count, width in zip(found, widths, strict=True))
        if 0 in counts.values() or [int(ratio * width) for width in widths] != found:
            return "transformers has one ratio of neurons to width for all blocks of the backbone"
        if len(set(pixels)) > 1 or len(set(queries)) > 1:
            return (
                "transformers has one number of neurons for all layers of the pixel decoder, and one for the decoder's"
            )
        config: Any = self.network.config
        backbone = config.backbone_config.to_dict() | {"mlp_ratio": ratio}
        sizes = {"encoder_feedforward_dim": pixels[:1], "dim_feedforward": queries[:1]}
        return {"backbone_config": backbone} | {name: count[0] for name, count in sizes.items() if count}


@checked
def mask2former(
    *,
    name: str | None = None,
    classes: Count | None = None,
    image_size: Count | tuple[Count, Count] | None = None,
    checkpoint: ExistingPath | None = None,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> Mask2Former:
    """Build a segmentation model with its weights, or at random where only `settings` are given.

    Args:
        name: A hub name, such as `facebook/mask2former-swin-tiny-ade-semantic`; unused when `checkpoint` is given.
        classes: Classes of the data, "no object" not counted; None takes the checkpoint's own.
        image_size: Side, or height and width, that images are scaled to, in pixels, multiples of 32. None takes what
            the checkpoint says: its size, or its shorter side for both.
        checkpoint: A folder in transformers' format or one that `save=true` wrote.
        settings: A configuration in transformers' terms, to build at random weights; with a checkpoint or a name, on
            top of theirs.
        training: How to train from random weights on first use.

    Raises:
        InputError: If neither weights nor settings are given, the weights are incomplete, of another architecture or
            answer in other classes, or the image size is no multiple of 32.
    """
    size = _size(image_size)
    if checkpoint is not None and (Path(checkpoint) / MANIFEST).is_file():
        return _saved(checkpoint, size, classes, settings)
    given = dict(settings or {})
    if (source := checkpoint or name) is None and not given:
        raise InputError("model=mask2former: give model.checkpoint=<folder>, model.name=<hub name>, or model.settings")
    if source is None:
        refuse_unknown_settings(given, KIND)
    network = built(given, classes) if source is None else loaded(source, checkpoint is not None, given, classes)
    label = None if source is None else str(source).rstrip("/").split("/")[-1]
    model = Mask2Former(network, _recipe(label, network, size), training if source is None else None)
    model.has_weights = source is not None
    return _with_images(model, {} if source is None else processor_of(source, checkpoint is not None), size)


def _recipe(name: str | None, network: nn.Module, size: tuple[int, int] | None) -> Recipe:
    arguments = {
        "name": name, "classes": int(network.config.num_labels), "image_size": size and list(size),  # type: ignore[union-attr,arg-type]
        "settings": plain_config(network),
    }  # fmt: skip
    return Recipe("models.mask2former.mask2former", arguments)


def _saved(
    checkpoint: str, size: tuple[int, int] | None, classes: int | None, settings: Mapping[str, Any] | None
) -> Mask2Former:
    asked = {"name": None, "classes": classes, "image_size": None, "settings": settings}
    stored = stored_recipe(checkpoint, Recipe("models.mask2former.mask2former", asked))
    if classes is not None and stored.arguments["classes"] != classes:
        raise InputError(
            f"model.checkpoint={checkpoint}: was saved with classes={stored.arguments['classes']}, "
            f"the data has {classes}"
        )
    model = Mask2Former(built(stored.arguments["settings"], None), stored)
    own = stored.arguments["image_size"]
    return _with_images(load_weights(model, checkpoint), processor_of(checkpoint, True), size or (own and tuple(own)))


def _with_images(model: Mask2Former, processor: Mapping[str, Any], size: tuple[int, int] | None) -> Mask2Former:
    model.processor = processor
    model.preprocessing = images_of(processor, size)
    return model


def _size(given: int | Sequence[int] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    height, width = (given, given) if isinstance(given, int) else given
    if height % STRIDE or width % STRIDE:
        raise InputError(f"model.image_size={given}: must be multiples of {STRIDE}, the stride of the coarsest map")
    return height, width
