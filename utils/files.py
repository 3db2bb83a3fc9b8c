"""Writing files so that a reader never meets half of one."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import RunError
from utils.locks import is_alive, place
from utils.progress import LARGE, followed

PIECE = 16 * 10**6

# more than what a run writes at its very start, in bytes
LEAST = 65_536
# what says that the place, and not the program, is at fault
REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}


def why_not_writable(folder: Path) -> str | None:
    """Say why a folder can't be made, or next to nothing be written in it, or None; nothing is left behind."""
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    try:
        os.rmdir(tempfile.mkdtemp(dir=there, prefix=".writable-"))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(LEAST))
            file.flush()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def write_atomically(path: Path, content: bytes, synced: bool = True) -> None:
    """Write a file completely or not at all; machines that share the folder never use one temporary name.

    What killed processes of this machine left of the same file is removed.

    Args:
        path: The file.
        content: All of it.
        synced: Wait until the disk has it, so that a power failure can't take it. Pictures and tables, which are made
            of a run's other files and can be again, need not wait.

    Raises:
        OSError: With the file's name, if it can't be written.
    """
    remove_abandoned(path)
    prefix = f"{_drafts(path)}{os.getpid()}-"
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file, content, path.name)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(file: BinaryIO, content: bytes, name: str) -> None:
    """Write all at once, or with a bar where that takes a while."""
    if len(content) < LARGE:
        file.write(content)
        return
    view = memoryview(content)
    for start in followed(f"write {name} (16 MB pieces)", range(0, len(content), PIECE)):
        file.write(view[start : start + PIECE])


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that were killed left of a file they were writing."""
    start = _drafts(path)
    with suppress(OSError):
        names = [name for name in os.listdir(path.parent) if name.startswith(start)]
        for name in names:
            pid = name.removeprefix(start).partition("-")[0]
            if pid.isdigit() and not is_alive(int(pid), None):
                (path.parent / name).unlink(missing_ok=True)


def _drafts(path: Path) -> str:
    """How the temporary names of a file start: with where process numbers mean something."""
    return f".{path.name}-{hashlib.sha256(place().encode()).hexdigest()[:12]}-"


@contextmanager
def full_disks_named() -> Iterator[None]:
    """Turn what a file system refuses inside a `with` into a message that names the file.

    Raises:
        RunError: In the place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise RunError(f"{error.filename or 'a file'}: cannot be read or written ({error.strerror})") from error
