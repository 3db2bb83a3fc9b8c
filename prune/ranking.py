"""Ranking a model once: scores come from the cache when everything they depend on is the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import prune.gates
from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Method, Scores
from utils.code import code_hash
from utils.storage import Artifact, Scratch, Store, folder_name, key_hash


@runtime_checkable
class Resumable(Protocol):
    """A method whose ranking is long enough to be gone on with."""

    def rank_on(self, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Score the dense model's units, from where an interrupted ranking stopped."""
        ...


@runtime_checkable
class BuiltOn(Protocol):
    """A method whose ranking goes on from that of another one, which is kept by itself."""

    def base(self, model: PrunableModel, data: DataBundle) -> Method | None:
        """The other method; None where this one starts from nothing."""
        ...

    def rank_from(self, base: Scores, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Score what the other method did not."""
        ...


@runtime_checkable
class Resolving(Protocol):
    """A method some of whose settings follow from the model, the data, or what lies in the storage."""

    def resolved(self, root: Path, model: PrunableModel, data: DataBundle) -> Method:
        """The method with those settings in place."""
        ...


@dataclass(frozen=True)
class Ranking:
    """Scores, and where they came from.

    Attributes:
        scores: Empty for a method that needs none.
        fingerprint: Hash of everything they depend on.
        path: The cache file.
        hit: Whether they were there already.
    """

    scores: Scores = Scores({})
    fingerprint: str | None = None
    path: Path | None = None
    hit: bool = False


def ranked(method: Method, model: PrunableModel, data: DataBundle, store: Store) -> Ranking:
    """Score a model's units, or fetch the scores if that was done before.

    The key holds weights and architecture, calibration data, ranker and its settings, the
    source code of ranker, model family and task, and the dtype; never the ratio, so a sweep
    ranks once.
    """
    if not method.ranks:
        return Ranking()
    method = method.resolved(store.root, model, data) if isinstance(method, Resolving) else method
    key = ranking_key(method, model, data)

    def compute(scratch: Scratch) -> Artifact:
        scores = _scored(method, model, data, store, scratch)
        return Artifact(scores.to_tensors(), {"method": method.name, **scores.facts})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, folder_name(method.name), key, compute)
    scores = Scores.from_tensors(found.artifact.tensors, found.artifact.facts)
    return Ranking(scores, key_hash(key), found.path, found.hit)


def _scored(method: Method, model: PrunableModel, data: DataBundle, store: Store, scratch: Scratch) -> Scores:
    if isinstance(method, BuiltOn) and (base := method.base(model, data)) is not None:
        return method.rank_from(ranked(base, model, data, store).scores, model, data, scratch)
    if isinstance(method, Resumable):
        return method.rank_on(model, data, scratch)
    return method.rank(model, data)


def ranking_key(method: Method, model: PrunableModel, data: DataBundle) -> dict[str, Any]:
    """Everything that scores depend on, as plain values."""
    own = getattr(method, "ranking_code", ())
    units = [[g.name, g.kind, g.count, g.width, g.consumer.module] for g in model.unit_groups()]
    return {
        "ranker": f"{type(method).__module__}.{type(method).__qualname__}",
        "code": code_hash(type(method), type(model), *model.code, type(data.task), prune.gates, *own),
        "settings": method.ranking_settings(),
        "weights": model.fingerprint(),
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "units": units,
        "calibration": data.fingerprints["calibration"] if method.looks_at_data else None,
        "task": data.task.name,
        "dtype": str(model.dtype),
    }
