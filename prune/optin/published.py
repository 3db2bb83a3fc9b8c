"""Rankings in the form that OPTIN's authors publish: found, read, and checked against a model.

A score there is final: already combined and modified, and negated, so that the lowest is the
most important. Rows count from 0; T is the number of tokens of a sample, [CLS] included.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import PrunableModel, UnitGroup
from prune.base import Scores
from prune.optin.unpickled import unpickled
from utils.errors import InputError

PUBLISHED = "published"
Row = tuple[float, int, int, str]
# the authors' `cap` files hold layer 0 alone and are never used
FILES = {"head": "head_ranking_body.pkl", "neuron": "neuron_ranking_body.pkl"}
LARGEST_SCORE = torch.finfo(torch.float32).max


def find_published(storage: Path, domain: str, dataset: str, model_name: str) -> Path | None:
    """Look for the authors' tree `<domain>/<dataset>/<model>/` under our storage.

    Names are compared by their letters and digits alone, without the hub's organisation:
    `deit_small_patch16_224` finds `deit-small-patch16-224`, and `glue-mnli` finds `mnli`.

    Args:
        storage: The root of all rankings.
        domain: `language` or `vision`.
        dataset: Our name of the data.
        model_name: Our name of the model.

    Returns:
        The folder with both files, or None.

    Raises:
        InputError: If several folders fit.
    """
    datasets = {_plain(dataset), _plain(dataset.partition("-")[2])} - {""}
    found = [
        model
        for data in _folders(storage / domain)
        if _plain(data.name) in datasets
        for model in _folders(data)
        if _plain(model.name) == _plain(model_name) and all((model / name).is_file() for name in FILES.values())
    ]
    if len(found) > 1:
        raise InputError(
            f"storage={storage}: {' and '.join(map(str, found))} both hold published rankings of {model_name}; "
            "must be one, or prune.rankings=<folder>"
        )
    return found[0] if found else None


def content_hash(folder: Path) -> str:
    """Hash of the published files of a folder, for whatever is kept under their name.

    Raises:
        InputError: If one is not there.
    """
    paths = [_existing(folder / name) for name in FILES.values()]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def read_ranking(path: Path) -> list[Row]:
    """Read one file: a pickled list of `(score, layer, index, kind)`.

    Returns:
        The rows in the file's order, scores as plain numbers.

    Raises:
        InputError: If the file holds anything else; nothing in it is ever run.
    """
    found = unpickled(_existing(path))
    if type(found) is not list:
        raise InputError(f"prune.rankings: {path}: holds a {type(found).__name__}; must be a list of rows")
    return [_row(row, f"prune.rankings: {path}: row {number}") for number, row in enumerate(found)]


def published_scores(folder: Path, model: PrunableModel, tokens: int | None) -> Scores:
    """Published rankings as scores of a model's units; higher means keep.

    Args:
        folder: Where both files lie.
        model: The dense model that they rank.
        tokens: T, where token positions may be ranked; None where the model has none.

    Returns:
        One term, `published`: per group (count,), and where token positions are ranked
        `<block>.tokens` per block, (T,), position 0 being [CLS]. All of it is final.

    Raises:
        InputError: If a file is missing or is not of the published form, or its rows are not
            each unit of the model exactly once.
    """
    heads, neurons = (_one_per_layer(model, kind) for kind in ("head", "neuron"))
    positions = 0 if tokens is None else tokens
    of_heads = _importances(folder / FILES["head"], "head", [g.count for g in heads], 0)
    of_neurons = _importances(folder / FILES["neuron"], "neuron", [g.count for g in neurons], positions)
    scores = {group.name: values for group, values in zip(heads, of_heads, strict=True)}
    for group, values, block in zip(neurons, of_neurons, model.blocks(), strict=True):
        scores[group.name] = values[: group.count].clone()
        if len(values) > group.count:
            scores[f"{block}.tokens"] = values[group.count :].clone()
    return Scores({PUBLISHED: scores})


def _one_per_layer(model: PrunableModel, kind: str) -> list[UnitGroup]:
    groups = [g for g in model.unit_groups() if g.kind == kind]
    others = sorted({g.kind for g in model.unit_groups()} - FILES.keys())
    if others or sorted(g.layer for g in groups) != list(range(len(model.blocks()))):
        raise InputError(
            f"prune.rankings: published rankings are of one group of heads and one of neurons a layer; "
            f"model={model.name} has {', '.join(others) if others else f'{len(groups)} groups of {kind}s'}"
        )
    return sorted(groups, key=lambda g: g.layer)


def _importances(path: Path, kind: str, counts: Sequence[int], tokens: int) -> list[Tensor]:
    """Negated scores of one file, a layer each: (count,), or (count + T,) with token positions."""
    rows = read_ranking(path)
    sizes = _sizes(path, kind, len(rows), counts, tokens)
    seen: dict[tuple[int, int], int] = {}
    for number, (_, layer, index, tag) in enumerate(rows):
        where = f"prune.rankings: {path}: row {number}"
        if tag != kind:
            raise InputError(f"{where}: is of a {tag}; must be of a {kind}")
        if layer >= len(sizes):
            raise InputError(f"{where}: layer={layer} must be below the model's {len(sizes)}")
        if index >= sizes[layer]:
            raise InputError(f"{where}: {kind}={index} of layer {layer} must be below {sizes[layer]}")
        if (first := seen.setdefault((layer, index), number)) != number:
            raise InputError(f"{where}: repeats {kind} {index} of layer {layer} from row {first}; must be there once")
    # as many rows as units, all in range and none twice: so none is missing
    return [torch.tensor([-rows[seen[layer, i]][0] for i in range(size)]) for layer, size in enumerate(sizes)]


def _sizes(path: Path, kind: str, rows: int, counts: Sequence[int], tokens: int) -> list[int]:
    """Rows that each layer has in a file of so many."""
    for more in (0, tokens):
        if rows == sum(counts) + more * len(counts):
            return [count + more for count in counts]
    units = f"{sum(counts)}, one for each {kind} of the model's {len(counts)} layers"
    with_tokens = f", or {sum(counts) + tokens * len(counts)} with {tokens} token positions a layer" if tokens else ""
    raise InputError(f"prune.rankings: {path}: has {rows} rows; must have {units}{with_tokens}")


def _row(row: Any, where: str) -> Row:
    if type(row) is not tuple or len(row) != 4:
        found = f"a tuple of {len(row)}" if type(row) is tuple else f"a {type(row).__name__}"
        raise InputError(f"{where}: is {found}; must be a tuple (score, layer, index, kind)")
    score, layer, index, kind = row
    for name, value in (("layer", layer), ("index", index)):
        if type(value) is not int:  # a bool is an int too
            raise InputError(f"{where}: {name} is a {type(value).__name__}; must be a whole number")
        if value < 0:
            raise InputError(f"{where}: {name} is negative; must be at least 0")
    if type(kind) is not str or kind not in FILES:
        raise InputError(f"{where}: kind must be one of {', '.join(FILES)}")
    return _number(score, where), layer, index, kind


def _number(score: Any, where: str) -> float:
    """The plain number of a 0-d floating tensor, or of a float."""
    single = isinstance(score, Tensor) and score.ndim == 0 and score.is_floating_point()
    if not single and type(score) is not float:
        raise InputError(f"{where}: score is a {type(score).__name__}; must be a single floating number")
    value = float(score)
    if not (math.isfinite(value) and abs(value) <= LARGEST_SCORE):
        raise InputError(f"{where}: score={value} must be finite, and fit a float32")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        files = " and ".join(FILES.values())
        raise InputError(f"prune.rankings: {path}: must be there; a published ranking is {files}")
    return path


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _plain(name: str) -> str:
    return "".join(c for c in name.rpartition("/")[2].lower() if c.isalnum())
