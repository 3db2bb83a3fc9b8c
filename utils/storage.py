"""A content-keyed cache on disk: safetensors with a JSON twin, safe to share and to interrupt.

Both files are written under temporary names and moved into place; the twin comes last and
holds the checksum of the arrays, so a missing, truncated or altered file is noticed.
"""

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from utils.distributed import Parcel, from_first, is_first, received, world_size
from utils.errors import InputError, RunError
from utils.files import remove_abandoned, write_atomically
from utils.locks import Lock

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
LONGEST_NAME = 160  # bytes; file systems take 255


@dataclass(frozen=True)
class Artifact:
    """What is kept: arrays by name, and facts about them that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Scratch:
    """Where a long computation keeps what it has so far, so that a killed one goes on from there.

    Without room for it the computation goes on all the same.

    One file, replaced as a whole; gone once the computation is complete. Of a run in several
    processes the first one writes and reads it, and all get what it read.

    Attributes:
        path: The file.
        joint: Whether all processes of the run use it together.
    """

    path: Path
    joint: bool = True

    def save(self, artifact: Artifact) -> None:
        """Replace what was kept before."""
        if not is_first():
            return
        tensors, facts = _portable(artifact.tensors), json.dumps(artifact.facts)
        said = {"facts": facts, "sha256": _sha256(save(tensors) + facts.encode())}
        try:
            write_atomically(self.path, save(tensors, metadata=said))
        except OSError as error:
            log.warning("%s can't be written (%s): an interrupted run would start again", self.path, error.strerror)

    def load(self) -> Artifact | None:
        """Return what an interrupted computation of the same key left, or None."""
        if not self.joint:
            return self._load()

        def left() -> Parcel:
            found = self._load()
            return ({}, None) if found is None else (found.tensors, [found.facts])

        tensors, facts = from_first(left)
        return None if facts is None else Artifact(tensors, facts[0])

    def _load(self) -> Artifact | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                said = file.metadata()
            tensors = load_file(self.path)
            if said["sha256"] != _sha256(save(tensors) + said["facts"].encode()):
                raise ValueError("arrays and facts do not match their checksum")
            return Artifact(tensors, json.loads(said["facts"]))
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
    """The cache below one root folder.

    Attributes:
        root: The folder.
        joint: Whether all processes of a run fetch together: the first one reads, locks and writes, all compute
            and all get the same. Otherwise each reads by itself, and only the first one writes.
    """

    root: Path
    joint: bool = True

    def fetch(
        self, folder: str, name: str, key: Mapping[str, Any], compute: Compute, by_first: bool = False
    ) -> Fetched:
        """Return the artifact of `key`, computing it once across processes.

        Args:
            folder: Readable place below the root, such as `vision/digits/toy_encoder`.
            name: What it is; the file is called `<name>-<hash of key>.safetensors`.
            key: Everything the artifact depends on, as plain JSON values.
            compute: Makes the artifact when it is not there or damaged; it may keep
                intermediate results in the scratch it is given.
            by_first: Whether, of a run in several processes, the first one computes alone (what a clock tells).

        Raises:
            InputError: If the folder can't be written.
        """
        if world_size() == 1 or (is_first() and not self.joint):
            return self._fetched(folder, name, key, compute)
        if not self.joint:
            return self._read_only(folder, name, key, compute)
        return self._together(folder, name, key, compute, by_first)

    def _together(self, folder: str, name: str, key: Mapping[str, Any], compute: Compute, by_first: bool) -> Fetched:
        """The same in all processes: where nothing is kept, the first one tells them to compute with it."""
        path = self._path(folder, name, key)
        if not is_first():
            tensors, facts = received()
            if facts == "compute":
                compute(Scratch(path.with_suffix(".partial")))
                tensors, facts = received()
            return Fetched(Artifact(tensors, facts[0]), path, facts[1])

        def with_all(scratch: Scratch) -> Artifact:
            if by_first:
                return compute(replace(scratch, joint=False))
            from_first(lambda: ({}, "compute"))
            return compute(scratch)

        found = self._fetched(folder, name, key, with_all)
        from_first(lambda: (found.artifact.tensors, [found.artifact.facts, found.hit]))
        return found

    def _read_only(self, folder: str, name: str, key: Mapping[str, Any], compute: Compute) -> Fetched:
        """What another process than the first does by itself: it never writes."""
        path = self._path(folder, name, key)
        found = self._read(path, key)
        hit = found is not None
        return Fetched(found or compute(Scratch(path.with_suffix(".partial"), joint=False)), path, hit)

    def _path(self, folder: str, name: str, key: Mapping[str, Any]) -> Path:
        if Path(folder).is_absolute() or ".." in Path(folder).parts or Path(name).name != name:
            raise InputError(f"storage: {folder}/{name}: must be a place below {self.root}")
        return self.root / folder / f"{name}-{key_hash(key)[:16]}.safetensors"

    def _fetched(self, folder: str, name: str, key: Mapping[str, Any], compute: Compute) -> Fetched:
        """The same in one process."""
        path = self._path(folder, name, key)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if (found := self._read(path, key)) is not None:
            _tidy(path)
            return Fetched(found, path, hit=True)
        with _locked(path) as lock:
            if (found := self._read(path, key)) is not None:  # another process was faster
                return Fetched(found, path, hit=True)
            scratch = Scratch(path.with_suffix(".partial"), self.joint)
            artifact = compute(scratch)
            with _writing(path):
                if not lock.is_held():
                    return self._late(path, key, artifact, lock)
                self._write(path, key, artifact)
                scratch.path.unlink(missing_ok=True)
                remove_abandoned(scratch.path)
        return Fetched(artifact, path, hit=False)

    def _late(self, path: Path, key: Mapping[str, Any], artifact: Artifact, lock: Lock) -> Fetched:
        """Keep an artifact whose lock another took meanwhile, as from a machine that slept: theirs counts."""
        log.warning("%s: its lock was lost while it was computed; another process may have made it", path.name)
        lock.acquire()
        if (found := self._read(path, key)) is not None:
            return Fetched(found, path, hit=True)
        self._write(path, key, artifact)
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
    if len(kept.encode()) > LONGEST_NAME:
        kept = f"{kept[: LONGEST_NAME // 4]}-{_sha256(name.encode(errors='surrogatepass'))[:16]}"
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            rule = "make room, or choose another place with storage="
            raise RunError(f"storage: cannot write {path} ({error.strerror}); {rule}") from error
        rule = "must be a writable folder; choose one with storage="
        raise InputError(f"storage: cannot write {path.parent} ({error.strerror}); {rule}") from error


def _tidy(path: Path) -> None:
    """Remove what a process left that was killed when its artifact was whole; a storage may also be read only."""
    scratch, lock = path.with_suffix(".partial"), Lock(path.with_suffix(".lock"))
    with suppress(OSError):
        if lock.path.exists() and lock.acquire(timeout=0):
            lock.release()
        scratch.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[Lock]:
    """Hold the lock of one artifact, which a holder that dies loses."""
    lock = Lock(path.with_suffix(".lock"))
    with _writing(path):
        if not lock.acquire(timeout=PATIENCE_S):
            log.info("waiting for another process that computes %s", path.name)
            lock.acquire()
    try:
        yield lock
    finally:
        lock.release()
