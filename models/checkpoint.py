"""Saving a model at its own widths and building it again: safetensors and a JSON manifest."""

import importlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.base import PrunableModel, Recipe
from models.biases import add_biases, missing_biases
from models.depth import refuse_bad_blocks
from models.keeping import Keeping
from models.limits import bounded_building, refuse_absurd_sizes
from models.merging import Reduction
from models.slicing import keep_units
from utils.errors import InputError, RunError
from utils.plain_json import read_json
from utils.progress import LARGE, followed, growing
from utils.targets import is_model_builder

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
METADATA = {"format": "pt"}
FORMAT = 1
WRAPPERS = ("model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema")

M = TypeVar("M", bound=PrunableModel)


def save_model(model: PrunableModel, folder: Path) -> Path:
    """Write weights and manifest to `folder`, completely or not at all.

    The manifest holds the builder, its arguments, per unit group which units of the dense
    network are left, under `blocks` which of its blocks (null: all), under `tokens` how they are
    merged (null: not at all), under `sparse` whether zeros are there by pruning, under `biased`
    whether modules were given biases that their family has not, and under
    `not_stock` why the family's own library can't load the folder; null means that it can.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        # transformers refuses a weights file that does not say where it comes from
        tensors = model.to_checkpoint(tensors_of(model))
        with growing("save the weights", partial, bytes_of(tensors)):
            save_file(tensors, partial / WEIGHTS, metadata=METADATA)
        manifest = _manifest(model) | {"not_stock": _stock_files(model, partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        partial.chmod(0o755)
        old = partial.with_name(f"{partial.name}-old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:  # its own word for a full disk
        raise RunError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _stock_files(model: PrunableModel, folder: Path) -> str | None:
    """Write what a stock library needs; a library that refuses must not cost the weights already there."""
    try:
        reason = model.stock_files(folder)
        if model.biased:
            (folder / "config.json").unlink(missing_ok=True)
            return "it has biases that its own library does not know"
        return reason
    except Exception as error:  # a third party's writer
        return f"its own library refused to write its configuration: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def how_to_load(folder: Path) -> str:
    """One line on what loads a saved model."""
    reason = _read_manifest(folder).get("not_stock")
    if reason is None:
        return f"{folder.name}/ loads with the family's own library, and with models.load"
    return f"{folder.name}/ loads with models.load alone: {reason}"


def load_network(folder: str | Path) -> nn.Module:
    """Build a saved model again, at its own widths, as a plain module.

    Args:
        folder: What `save=true` wrote.

    Raises:
        InputError: If the folder is damaged, or was saved by a builder outside this package,
            which is not called on a file's word.
    """
    return load_model(folder).network


def load_model(folder: str | Path) -> PrunableModel:
    """The same with its unit groups, as a model that can be measured and pruned further.

    Args:
        folder: What `save=true` wrote.

    Raises:
        InputError: As `load_network`.
    """
    manifest = _read_manifest(Path(folder))
    module, _, function = str(manifest["builder"]).rpartition(".")
    if not module.startswith("models."):
        raise InputError(f"{folder}: was saved by {manifest['builder']}; call that builder with checkpoint={folder}")
    arguments = manifest["arguments"]
    if not isinstance(arguments, dict) or not is_model_builder(str(manifest["builder"])):
        why = f"{manifest['builder']} builds no model"
        raise InputError(f"{folder}: builder and arguments of {MANIFEST} are damaged: {why}")
    refuse_absurd_sizes(arguments, f"{folder}: arguments of {MANIFEST}")
    build = getattr(importlib.import_module(module), function)
    try:
        with bounded_building(f"{folder}"):
            return build(**arguments, checkpoint=str(folder))
    except TypeError as error:
        raise InputError(f"{folder}: arguments of {MANIFEST} are damaged: {error}") from error


def tensors_of(model: PrunableModel) -> dict[str, Tensor]:
    """Every weight and buffer that a checkpoint holds, on the CPU; tied ones under their first name."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _untied(model).items()}


def fill(model: PrunableModel, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors that `tensors_of` gave back into a model of the same shape."""
    held = _untied(model)
    if held.keys() != tensors.keys():
        raise ValueError(f"tensors differ from the model's: {sorted(held.keys() ^ tensors.keys())}")
    # a file's tensors are read when they are copied
    items = followed("load the weights", tensors.items()) if bytes_of(tensors) >= LARGE else tensors.items()
    with torch.no_grad():
        for name, tensor in items:
            held[name].copy_(tensor)


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _untied(model: PrunableModel) -> dict[str, Tensor]:
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def stored_recipe(checkpoint: str, asked: Recipe) -> Recipe:
    """The recipe a checkpoint folder was saved with; a bare weights file has none and keeps `asked`."""
    path = Path(checkpoint)
    if path.is_file() or not (path / MANIFEST).is_file() and _weights_in(path):
        return asked
    manifest = _read_manifest(path)
    if manifest["builder"] != asked.builder:
        raise InputError(
            f"model.checkpoint={checkpoint}: was saved from {manifest['builder']}, "
            f"this model is {asked.builder}; choose the model it came from"
        )
    if not isinstance(manifest["arguments"], dict) or set(manifest["arguments"]) - set(asked.arguments):
        odd = sorted(map(str, set(manifest["arguments"]) - set(asked.arguments)))
        raise InputError(f"model.checkpoint={checkpoint}: arguments of {MANIFEST} do not fit {asked.builder}: {odd}")
    name, stored = asked.arguments.get("name"), manifest["arguments"].get("name")
    refuse_absurd_sizes(manifest["arguments"], f"model.checkpoint={checkpoint}: arguments of {MANIFEST}")
    if asked.exact_name and name is not None and stored is not None and name != stored:
        raise InputError(f"model.checkpoint={checkpoint}: was saved from model.name={stored}, asked is {name}")
    _refuse_other_settings(checkpoint, asked.arguments.get("settings"), manifest["arguments"].get("settings"))
    # an argument that the builder has gained since then is as the configuration says
    return replace(asked, arguments={**asked.arguments, **manifest["arguments"]})


def _refuse_other_settings(checkpoint: str, asked: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> None:
    """Raise an InputError for a setting that the saved model does not have: the model is built as it was saved."""
    for name, value in (asked or {}).items():
        if name not in (found := stored or {}) or found[name] != value:
            own = f"with {name}={found[name]}" if name in found else "without it"
            raise InputError(f"model.settings.{name}={value}: model.checkpoint={checkpoint} was saved {own}")


def load_weights(model: M, checkpoint: str, skip: Sequence[str] = (), foreign: Sequence[str] = ()) -> M:
    """Shrink a freshly built dense model to a checkpoint's widths and load it strictly.

    Args:
        model: The dense model; changed in place.
        checkpoint: A folder that `save=true` wrote, any folder with one weights file, or a
            `.safetensors`, `.pth`, `.pt` or `.bin` file.
        skip: Names that stay as they are whatever the checkpoint holds.
        foreign: Parts of names that the checkpoint may hold beyond the model's.

    Raises:
        InputError: If a file is missing or damaged, or names and shapes differ.
    """
    path, manifest = Path(checkpoint), None
    if (path / MANIFEST).is_file():
        manifest = _read_manifest(path)
        _keep_blocks(manifest, model, checkpoint)
        origin = _origin(manifest, model, checkpoint)
        keep_units(model.network, model.unit_groups(), origin)
        model.origin.update(origin)
        model.sparse = manifest["sparse"]
        _merge_tokens(manifest, model, checkpoint)
        path = path / WEIGHTS
    elif path.is_dir():
        path = _weights_in(path) or path / WEIGHTS
    read = model.from_checkpoint(_read_tensors(path, checkpoint))
    if manifest is not None and manifest["biased"]:
        add_biases(model, missing_biases(model, read))
    held = _untied(model)
    kept = {name: held[name].detach() for name in skip if name in held}
    unwanted = {name for name in read if name not in held and any(part in name for part in foreign)}
    tensors = {name: t for name, t in read.items() if name not in {*skip, *unwanted}} | kept
    _refuse_misfit(tensors, held, checkpoint)
    model.network.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
    fill(model, tensors)
    model.training, model.has_weights = None, True
    return model


def _manifest(model: PrunableModel) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": list(model.block_origin) if len(model.block_origin) < model.dense_depth else None,
        "units": {name: units.tolist() for name, units in model.origin.items()},
        "tokens": model.reduction.to_json() if model.reduction else None,
        "sparse": model.sparse,
        "biased": model.biased,
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"model.checkpoint={folder}: must be a folder with a {MANIFEST}, or a .safetensors file")
    try:
        manifest = read_json(path)
        found = {key: manifest[key] for key in ("format", "builder", "arguments", "units")}
        # a folder from before tokens could be merged, or blocks removed, has none
        found |= {key: manifest.get(key) for key in ("tokens", "blocks")}
        found |= {key: manifest.get(key, False) is True for key in ("sparse", "biased")}
        found["not_stock"] = manifest.get("not_stock", "it was saved before stock folders were written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model.checkpoint={folder}: {MANIFEST} is damaged ({error!r})") from error
    if found["format"] != FORMAT:
        raise InputError(f"model.checkpoint={folder}: format {found['format']} is not {FORMAT}, the one known here")
    return found


def _origin(manifest: Mapping[str, Any], model: PrunableModel, checkpoint: str) -> dict[str, Tensor]:
    """Which dense units the checkpoint kept, per group; refused if they can't be the model's."""
    units, counts = manifest["units"], {group.name: group.count for group in model.unit_groups()}
    if not isinstance(units, dict) or units.keys() - counts.keys():
        known = ", ".join(counts)
        raise InputError(f"model.checkpoint={checkpoint}: units of {MANIFEST} are damaged; the groups are {known}")
    for name, kept in units.items():
        whole = isinstance(kept, list) and all(type(i) is int and 0 <= i < counts[name] for i in kept)
        if not whole or kept != sorted(set(kept)):
            rule = f"must be ascending units in [0, {counts[name]})"
            raise InputError(f"model.checkpoint={checkpoint}: units of {name} in {MANIFEST} are damaged; they {rule}")
    return {name: torch.tensor(kept, dtype=torch.int64) for name, kept in units.items()}


def _keep_blocks(manifest: Mapping[str, Any], model: PrunableModel, checkpoint: str) -> None:
    if manifest["blocks"] is None:
        return
    try:
        refuse_bad_blocks(manifest["blocks"], len(model.blocks()))
        model.keep_blocks(manifest["blocks"])
    except (ValueError, TypeError) as error:
        raise InputError(f"model.checkpoint={checkpoint}: blocks of {MANIFEST} are damaged: {error}") from error


def _merge_tokens(manifest: Mapping[str, Any], model: PrunableModel, checkpoint: str) -> None:
    if manifest["tokens"] is None:
        return
    try:
        model.reduce_tokens(reduction_of(manifest["tokens"]))
    except InputError as error:
        raise InputError(f"model.checkpoint={checkpoint}: tokens of {MANIFEST} are damaged: {error}") from error


def reduction_of(found: Any) -> Reduction | Keeping:
    """Tokens merged or dropped, from plain values."""
    dropped = isinstance(found, Mapping) and "rule" in found
    return Keeping.from_json(found) if dropped else Reduction.from_json(found)


def _read_tensors(path: Path, checkpoint: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"model.checkpoint={checkpoint}: {path.name} is missing")
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_pickled(path, checkpoint)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        message = f"model.checkpoint={checkpoint}: {path.name} is damaged or no safetensors file ({error})"
        raise InputError(message) from error


def _read_pickled(path: Path, checkpoint: str) -> dict[str, Tensor]:
    """Tensors of a torch file, unwrapped from a training script's dictionary; no code in it is run."""
    try:
        _refuse_packed(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the damage happens to cause
        raise InputError(
            f"model.checkpoint={checkpoint}: {path.name} is damaged, or holds more than tensors; only weights are "
            f"read, and nothing in the file was run ({type(error).__name__})"
        ) from error
    wrapper = next((key for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)), None)
    found = found[wrapper] if wrapper else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"model.checkpoint={checkpoint}: {path.name} must hold tensors by name, and nothing else")
    if odd := next((name for name, tensor in found.items() if not _is_plain(tensor)), None):
        rule = "must be stored in full, as dense numbers in main memory"
        raise InputError(f"model.checkpoint={checkpoint}: {path.name}: {odd!r} {rule}")
    # DistributedDataParallel puts this before every name
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _refuse_packed(path: Path) -> None:
    """Refuse an archive whose parts are larger unpacked than the file: torch writes them as they are."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("packed parts")


def _is_plain(tensor: Tensor) -> bool:
    """Whether every number of a tensor is in the file: a view of one number may claim any shape."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _weights_in(folder: Path) -> Path | None:
    """The weights file of a folder that another library wrote."""
    names = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"


def _refuse_misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], checkpoint: str) -> None:
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        there, here = (_shape(side.get(name)) for side in (found, wanted))
        if there != here:
            raise InputError(
                f"model.checkpoint={checkpoint}: first difference at {name!r}: the file has {there}, the model {here}"
            )
