"""Building and loading transformers' Mask2Former, and giving it the parts that can be cut."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from models.hf import config_of, quiet, whole_network
from models.mask2former_decoder import batch_first
from models.mask2former_units import note_head_widths
from models.preprocessing import ImagePreprocessing
from models.recast import recast
from models.swin_backbone import FeatureMaps
from utils.errors import InputError
from utils.hooks import drop_hooks
from utils.hub import from_cache_or_hub

KIND = "mask2former"
PROCESSOR_FILE = "preprocessor_config.json"
STRIDE = 32  # of the coarsest feature map
SIDE = 512
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# what a checkpoint may lack: the norm of an output that a backbone does not give, and weights of the loss
UNREAD = ("encoder.swin.layernorm.", "criterion.")


def built(settings: Mapping[str, Any], classes: int | None) -> nn.Module:
    """Build a network at random weights from a configuration in transformers' terms.

    Raises:
        InputError: If `settings` does not make a network that is covered.
    """
    given = {name: value for name, value in settings.items() if name != "model_type"}
    if (kind := settings.get("model_type", KIND)) != KIND:
        raise InputError(f"model.settings: model_type={kind}; must be {KIND}")
    if classes is not None:
        given = {name: value for name, value in given.items() if name not in ("id2label", "label2id")}
        given["num_labels"] = classes
    try:
        config = Mask2FormerConfig(**given)
        refuse_uncovered(config, "model.settings")
        with quiet():
            network = Mask2FormerForUniversalSegmentation(config)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"model.settings: cannot build a {KIND} from them: {why}") from error
    return adapted(network, "model.settings")


def loaded(source: str, local: bool, settings: Mapping[str, Any], classes: int | None) -> nn.Module:
    """Load a network with all its weights, from a folder or by hub name.

    Raises:
        InputError: If it is of another architecture, answers in other classes, or lacks weights.
    """
    key = f"model.checkpoint={source}" if local else f"model.name={source}"
    config = config_of(source, local, settings)
    refuse_uncovered(config, key)
    if classes is not None and config.num_labels != classes:
        raise InputError(
            f"{key}: first difference at the class predictor: it answers in {config.num_labels} classes, the data has "
            f"{classes}; take the checkpoint that was trained on this data"
        )
    network = whole_network(Mask2FormerForUniversalSegmentation, source, local, config, UNREAD)
    return adapted(network, key)


def refuse_uncovered(config: Any, key: str) -> None:
    """Raise an InputError that says why a configuration's network can't be cut."""
    if config.model_type != KIND:
        raise InputError(f"{key}: its configuration is that of a {config.model_type}; model={KIND} needs a {KIND}")
    backbone = config.backbone_config
    if backbone is None or backbone.model_type != "swin":
        found = "none in transformers' own terms" if backbone is None else backbone.model_type
        raise InputError(f"{key}: its backbone is {found}; covered is swin")
    widths = [backbone.embed_dim * 2**stage for stage in range(len(backbone.depths))]
    if any(width % heads for width, heads in zip(widths, backbone.num_heads, strict=False)):
        raise InputError(f"{key}: num_heads={list(backbone.num_heads)} must divide the stages' widths {widths}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{key}: its weights are quantized; quantized rows and columns cannot be cut exactly")


def adapted(network: Any, key: str) -> nn.Module:
    """The same network with a backbone and a decoder that run on any number of units.

    Raises:
        InputError: If this version of transformers does not hold all weights that the network computes with.
    """
    pixels, queries = network.model.pixel_level_module, network.model.transformer_module
    if isinstance(queries.input_projections, list) and any(list(p.parameters()) for p in queries.input_projections):
        raise InputError(
            f"{key}: this version of transformers neither loads nor saves the convolutions between pixel decoder and "
            "decoder (feature_size other than hidden_dim, or enforce_input_projection); take transformers 5.23"
        )
    drop_hooks(network)  # those that transformers records hidden states by
    pixels.encoder = recast(pixels.encoder, FeatureMaps)
    pixels.encoder.swin.layernorm = nn.Identity()  # type: ignore[assignment]  # of an output that a backbone does not give
    queries.decoder = batch_first(queries.decoder)
    note_head_widths(network)
    return network


def processor_of(source: str, local: bool) -> dict[str, Any]:
    """What lies beside the weights on how images are prepared; empty where nothing does.

    Raises:
        InputError: If the file is damaged.
    """
    path = Path(source) / PROCESSOR_FILE
    if not local:

        def load(only_here: bool) -> str:
            return hf_hub_download(source, PROCESSOR_FILE, local_files_only=only_here)

        try:
            path = Path(from_cache_or_hub(load, f"model.name={source}", "model.checkpoint=<folder>"))
        except InputError:
            return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path.name} beside the weights of {source} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def images_of(processor: Mapping[str, Any], image_size: tuple[int, int] | None) -> ImagePreprocessing:
    """How images are prepared: scaled whole to one size, so that all of a batch are alike.

    Args:
        processor: The image processor's settings in transformers' terms; ImageNet's statistics where it has none.
        image_size: Height and width; None takes the processor's own, the shorter side both ways.
    """
    size = processor.get("size") or {}
    shorter = size.get("shortest_edge") or SIDE
    height, width = image_size or (size.get("height") or shorter, size.get("width") or shorter)
    return ImagePreprocessing(
        input_size=(3, _rounded(height), _rounded(width)),
        mean=tuple(processor.get("image_mean") or IMAGENET_MEAN),
        std=tuple(processor.get("image_std") or IMAGENET_STD),
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="squash",
    )


def _rounded(length: int) -> int:
    return -(-length // STRIDE) * STRIDE
