"""Ranking a model once: scores come from the cache when everything they depend on is the same."""

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prune.gates
from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Method, Scores
from utils.storage import Artifact, Scratch, Store, folder_name, key_hash


@dataclass(frozen=True)
class Ranking:
    """Scores, and where they came from.

    Attributes:
        scores: None for a method that needs none.
        fingerprint: Hash of everything they depend on.
        path: The cache file.
        hit: Whether they were there already.
    """

    scores: Scores | None = None
    fingerprint: str | None = None
    path: Path | None = None
    hit: bool = False


def ranked(method: Method, model: PrunableModel, data: DataBundle, store: Store) -> Ranking:
    """Score a model's units, or fetch the scores if that was done before.

    The key holds weights, calibration data, ranker, its settings and source code, and the
    dtype; never the ratio, so a sweep ranks once.
    """
    if not method.ranks:
        return Ranking()
    key = ranking_key(method, model, data)

    def compute(scratch: Scratch) -> Artifact:
        scores = method.rank(model, data)
        assert scores is not None
        return Artifact(scores.to_tensors(), {"method": method.name})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, folder_name(method.name), key, compute)
    return Ranking(Scores.from_tensors(found.artifact.tensors), key_hash(key), found.path, found.hit)


def ranking_key(method: Method, model: PrunableModel, data: DataBundle) -> dict[str, Any]:
    """Everything that scores depend on, as plain values."""
    return {
        "ranker": f"{type(method).__module__}.{type(method).__qualname__}",
        "code": _code_hash(method),
        "settings": method.ranking_settings(),
        "model": model.fingerprint(),
        "calibration": data.fingerprints["calibration"],
        "task": data.task.name,
        "dtype": str(model.dtype),
    }


def _code_hash(method: Method) -> str:
    """Hash of the ranker's source file and of the gates, so that edited code never meets old scores."""
    sources = [inspect.getsourcefile(type(method)), inspect.getsourcefile(prune.gates)]
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in sources if path)).hexdigest()
