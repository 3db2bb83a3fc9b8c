"""A content-keyed cache on disk: safetensors with a JSON twin, safe to share and to interrupt.

Both files are written under temporary names and moved into place; the twin comes last and
holds the checksum of the arrays, so a missing, truncated or altered file is noticed.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from utils.errors import InputError
from utils.files import write_atomically

log = logging.getLogger(__name__)

PATIENCE_S = 2.0


@dataclass(frozen=True)
class Artifact:
    """What is kept: arrays by name, and facts about them that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Scratch:
    """Where a long computation keeps what it has so far, so that a killed one goes on from there.

    One file, replaced as a whole; gone once the computation is complete.
    """

    path: Path

    def save(self, artifact: Artifact) -> None:
        """Replace what was kept before."""
        facts = {"facts": json.dumps(artifact.facts)}
        write_atomically(self.path, save(_portable(artifact.tensors), metadata=facts))

    def load(self) -> Artifact | None:
        """Return what an interrupted computation of the same key left, or None."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
            return Artifact(load_file(self.path), facts)
        except Exception as error:
            log.warning("%s is damaged (%s): starting again", self.path, error)
            return None


@dataclass(frozen=True)
class Fetched:
    """An artifact, where it lies, and whether it was there already."""

    artifact: Artifact
    path: Path
    hit: bool


Compute = Callable[[Scratch], Artifact]


@dataclass(frozen=True)
class Store:
    """The cache below one root folder."""

    root: Path

    def fetch(self, folder: str, name: str, key: Mapping[str, Any], compute: Compute) -> Fetched:
        """Return the artifact of `key`, computing it once across processes.

        Args:
            folder: Readable place below the root, such as `vision/digits/toy_encoder`.
            name: What it is; the file is called `<name>-<hash of key>.safetensors`.
            key: Everything the artifact depends on, as plain JSON values.
            compute: Makes the artifact when it is not there or damaged; it may keep
                intermediate results in the scratch it is given.

        Raises:
            InputError: If the folder can't be written.
        """
        path = self.root / folder / f"{name}-{key_hash(key)[:16]}.safetensors"
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if (found := self._read(path, key)) is not None:
            return Fetched(found, path, hit=True)
        with _locked(path):
            if (found := self._read(path, key)) is not None:  # another process was faster
                return Fetched(found, path, hit=True)
            scratch = Scratch(path.with_suffix(".partial"))
            artifact = compute(scratch)
            with _writing(path):
                self._write(path, key, artifact)
                scratch.path.unlink(missing_ok=True)
        return Fetched(artifact, path, hit=False)

    def _read(self, path: Path, key: Mapping[str, Any]) -> Artifact | None:
        """Return what lies at `path` if it is whole and belongs to `key`, else None."""
        twin_path = path.with_suffix(".json")
        if not path.is_file() or not twin_path.is_file():
            return None
        try:
            twin = json.loads(twin_path.read_bytes())
            content = path.read_bytes()
            if twin["sha256"] != _checksum(content, twin["key"], twin["facts"]):
                raise ValueError("arrays and JSON twin do not match their checksum")
            if twin["key"] != _plain(key):
                raise ValueError("its JSON twin belongs to another key")
            return Artifact(load(content), twin["facts"])
        except Exception as error:
            log.warning("%s is damaged (%s): computing it again", path, error)
            return None

    def _write(self, path: Path, key: Mapping[str, Any], artifact: Artifact) -> None:
        content = save(_portable(artifact.tensors))
        facts = _plain(artifact.facts)
        twin = {"key": _plain(key), "sha256": _checksum(content, _plain(key), facts), "facts": facts}
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(twin, indent=1).encode())


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def key_hash(key: Mapping[str, Any]) -> str:
    """Hash of a key's canonical JSON."""
    return _sha256(json.dumps(key, sort_keys=True).encode())


def folder_name(name: str) -> str:
    """One path component for a hub name, a path or a plain name."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-")
    return kept or "unnamed"


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key))


def _checksum(content: bytes, key: Any, facts: Any) -> str:
    return _sha256(content + json.dumps([key, facts], sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = "must be a writable folder; choose one with storage="
        raise InputError(f"storage: cannot write {path.parent} ({error.strerror}); {rule}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, which the kernel drops if the process dies."""
    lock = FileLock(path.with_suffix(".lock"))
    with _writing(path):
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            log.info("waiting for another process that computes %s", path.name)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
