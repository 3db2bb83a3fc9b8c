"""What all families from timm share: building by name, weights from the hub or a file, transforms."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
from huggingface_hub import hf_hub_download
from timm.data import resolve_model_data_config  # type: ignore[attr-defined]
from torch import nn

from models.base import PrunableModel, Recipe
from models.checkpoint import load_weights, stored_recipe
from models.preprocessing import ImagePreprocessing
from utils.errors import InputError
from utils.hub import from_cache_or_hub

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
STOCK_CONFIG = "config.json"

M = TypeVar("M", bound=PrunableModel)


def assembled(
    family: Callable[[nn.Module, Recipe, Any], M],
    recipe: Recipe,
    *,
    pretrained: bool,
    checkpoint: str | None,
    new_head: bool,
    training: Any,
    derived: Sequence[str] = (),
) -> M:
    """Build a timm model with the weights that were asked for.

    Args:
        family: Makes the adapter of network, recipe and training.
        recipe: Arguments `name`, `classes`, `settings` and, where sizes are fixed, `image_size`.
        pretrained: Take the weights that timm publishes under the name.
        checkpoint: A weights file or a folder; wins over `pretrained`.
        new_head: Leave the classifier at random weights, to be trained on first use.
        training: How to train where the weights are not complete.
        derived: Parts of names that a checkpoint may hold beyond the network's, as they follow from its sizes.

    Raises:
        InputError: If the name is unknown, or weights are missing or don't fit.
    """
    if checkpoint is not None:
        recipe = stored_recipe(checkpoint, recipe)
    network = network_of(**recipe.arguments)
    published = pretrained and checkpoint is None
    if published:
        network = _published(network, recipe.arguments, new_head)
    model = family(network, recipe, training)
    model.preprocessing = preprocessing_of(network)
    if checkpoint is not None:
        load_weights(model, checkpoint, skip=head_names(network) if new_head else (), foreign=derived)
    model.has_weights = (published or checkpoint is not None) and not new_head
    model.training = None if model.has_weights else training
    return model


def network_of(name: str, classes: int | None, settings: Mapping[str, Any], image_size: int | None = None) -> nn.Module:
    """Build a timm model by name at random weights; `settings` are timm's own model arguments."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"model.name={name}: timm has no such model; did you mean {' or '.join(near) or 'another'}?")
    sizes = {"num_classes": classes, "img_size": image_size}
    for key, size in sizes.items():
        if size is not None and key in settings:
            own = {"num_classes": "model.classes", "img_size": "model.image_size"}[key]
            raise InputError(f"model.settings.{key}={settings[key]}: must be left out; {own}={size} says it")
    try:
        return timm.create_model(name, **{k: v for k, v in sizes.items() if v is not None}, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError) as error:
        given = ", ".join(f"{key}={value}" for key, value in {**sizes, **settings}.items() if value is not None)
        raise InputError(f"model.name={name}: timm cannot build it with {given or 'no arguments'}: {error}") from error


def _published(network: nn.Module, arguments: Mapping[str, Any], new_head: bool) -> nn.Module:
    """The same network with the weights that timm publishes."""
    name, source = arguments["name"], network.pretrained_cfg or {}  # type: ignore[operator]
    repository, classes = source.get("hf_hub_id"), source.get("num_classes")  # type: ignore[union-attr]
    if not repository:
        raise InputError(f"model.name={name}: timm publishes no weights for it; give model.checkpoint")
    if classes != network.num_classes and not new_head:
        raise InputError(
            f"model.name={name}: its published weights answer in {classes} classes, model.classes="
            f"{network.num_classes}; model.new_head=true trains a new classifier on first use"
        )

    def load(local: bool) -> str:
        for file in WEIGHT_FILES[:-1]:
            try:
                return hf_hub_download(repository, file, local_files_only=local)  # type: ignore[arg-type]
            except FileNotFoundError:
                continue
        return hf_hub_download(repository, WEIGHT_FILES[-1], local_files_only=local)  # type: ignore[arg-type]

    instead = "model.checkpoint=<file or folder>"
    path = from_cache_or_hub(load, f"model.name={name}: its weights ({repository})", instead)
    kept = {"num_classes": arguments["classes"], "img_size": arguments.get("image_size"), **arguments["settings"]}
    given = {key: value for key, value in kept.items() if value is not None}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **given)


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's weights."""
    heads = network.get_classifier()  # type: ignore[operator]
    owned = {id(m) for head in (heads if isinstance(heads, tuple) else (heads,)) for m in head.modules()}
    modules = [(name, module) for name, module in network.named_modules() if id(module) in owned]
    return tuple(f"{name}.{leaf}" for name, m in modules for leaf, _ in m.named_parameters(recurse=False))


def preprocessing_of(network: nn.Module) -> ImagePreprocessing:
    """The transforms that timm states for a network, at the size that it was built for."""
    found = resolve_model_data_config(network)
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or found["input_size"][1:]
    return ImagePreprocessing(
        input_size=(found["input_size"][0], *size),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        crop_mode=found["crop_mode"],
    )


def write_stock(model: PrunableModel, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the config.json with which `timm.create_model("local-dir:<folder>", pretrained=True)` loads the weights."""
    arguments, images = model.recipe.arguments, model.preprocessing
    size = {"img_size": arguments["image_size"]} if arguments.get("image_size") else {}
    config = {
        "architecture": arguments["name"],
        "num_classes": model.network.num_classes,
        "model_args": {**size, **arguments["settings"], **settings},
        "pretrained_cfg": {
            "num_classes": model.network.num_classes,
            "input_size": list(images.input_size),
            "mean": list(images.mean),
            "std": list(images.std),
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
            "crop_mode": images.crop_mode,
        },
    }
    (folder / STOCK_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
