"""Fingerprints of source code, so that edited code never meets results of the old."""

import hashlib
import inspect
from pathlib import Path
from types import ModuleType


def code_hash(*things: type | ModuleType) -> str:
    """Hash the source files of modules and of classes with all their bases.

    Code without a source file (built in, or typed at a prompt) enters by its name.
    """
    classes = [base for thing in things if isinstance(thing, type) for base in thing.__mro__[:-1]]
    modules = [thing for thing in things if isinstance(thing, ModuleType)]
    digest = hashlib.sha256()
    for thing in dict.fromkeys([*classes, *modules]):
        digest.update(_source(thing))
    return digest.hexdigest()


def _source(thing: type | ModuleType) -> bytes:
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:
        path = None
    return Path(path).read_bytes() if path and Path(path).is_file() else repr(thing).encode()
