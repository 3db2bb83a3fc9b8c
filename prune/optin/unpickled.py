"""Pickles of plain rows and 0-d tensors, read without running anything that they hold.

Two gates: the bytes are first scanned for instructions and sizes that no such file needs,
then loaded by an unpickler that knows three names.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from torch.storage import TypedStorage

from utils.errors import InputError

LARGEST_BYTES = 64 * 2**20  # 100,000 rows take 30 MB
LARGEST_STORAGE_BYTES = 4096  # the storage of one number takes 260
# what lists, tuples, numbers, text and calls of a named function are written with (protocols 3 to 5);
# left out is all that sets attributes, makes instances, or takes objects from elsewhere
OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "GLOBAL", "STACK_GLOBAL", "REDUCE",
})  # fmt: skip
PUTS = ("BINPUT", "LONG_BINPUT")


def unpickled(path: Path) -> Any:
    """Load a pickle that holds nothing but lists, tuples, plain values and 0-d tensors.

    Returns:
        What it holds; tensors on the CPU.

    Raises:
        InputError: If it is no such file, damaged, or larger than 64 MiB. What it would
            call is never called.
    """
    content = _content(path)
    _refuse_other_opcodes(content, path)
    reader = _Reader(io.BytesIO(content))
    try:
        return reader.load()
    except InputError as error:
        raise InputError(f"prune.rankings: {path}: row {reader.tensors}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        why = f"{type(error).__name__}: {brief(str(error))}"
        raise InputError(f"prune.rankings: {path}: row {reader.tensors}: cannot be read ({why})") from error


def brief(text: str) -> str:
    """The first line of a text of unknown length."""
    return text.strip().partition("\n")[0][:160]


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"prune.rankings: {path}: must be a file")
    try:
        if (size := path.stat().st_size) > LARGEST_BYTES:
            raise InputError(f"prune.rankings: {path}: has {size} bytes; must have at most {LARGEST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"prune.rankings: {path}: cannot be read ({error.strerror})") from error


def _refuse_other_opcodes(content: bytes, path: Path) -> None:
    """Scan without loading; an unpickler sets memory aside before it finds a size too large."""
    position = -1
    try:
        for opcode, argument, at in pickletools.genops(content):
            position = int(at or 0)
            if opcode.name not in OPCODES:
                raise InputError(
                    f"prune.rankings: {path}: has the instruction {opcode.name} at byte {position}; must hold a list "
                    "of tuples, plain values and tensors alone"
                )
            if opcode.name in PUTS and int(argument or 0) > position:
                raise InputError(
                    f"prune.rankings: {path}: numbers an object {argument} at byte {position}; must be at most that"
                )
    except InputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {brief(str(error))}"
        raise InputError(
            f"prune.rankings: {path}: must be a whole pickle; damaged behind byte {position} ({why})"
        ) from error
    if rest := len(content) - position - 1:
        raise InputError(f"prune.rankings: {path}: must end with its pickle; {rest} bytes follow")


class _Reader(pickle.Unpickler):
    """Knows what a tensor is rebuilt from, and refuses every other name.

    Attributes:
        tensors: How many were rebuilt so far: the row, in a file with one tensor a row.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors = 0

    def find_class(self, module_name: str, global_name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module_name, global_name) not in known:
            asked = brief(f"{module_name}.{global_name}")
            raise InputError(f"asks for {asked}; must hold plain values and tensors alone")
        return known[module_name, global_name]

    def persistent_load(self, pid: Any) -> Any:
        raise InputError("refers to an object outside the file; must hold plain values and tensors alone")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> Tensor:
        _refuse_other_tensors(storage, offset, size, stride, flags)
        tensor = _rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())
        self.tensors += 1
        return tensor


def _refuse_other_tensors(storage: Any, offset: Any, size: Any, stride: Any, flags: tuple[Any, ...]) -> None:
    """Refuse anything but one number of a storage: no shape, no hooks, no metadata."""
    if not isinstance(storage, TypedStorage):
        raise InputError(f"has a tensor on a {type(storage).__name__}; must be a storage")
    count = storage._size()  # torch would grow a storage that is too small for the offset
    if type(offset) is not int or not 0 <= offset < count:
        raise InputError(f"has a tensor whose offset must be a whole number below {count}, the size of its storage")
    if size != () or stride != ():
        raise InputError("has a tensor with dimensions; must be a single number")
    if not flags or type(flags[0]) is not bool or any(flags[1:]):
        raise InputError("has a tensor with hooks or metadata; must be a single number without")


def _storage(content: Any) -> Any:
    """A tensor's storage from its own bytes, by torch's restricted loader."""
    if type(content) is not bytes or len(content) > LARGEST_STORAGE_BYTES:
        raise InputError(f"has a storage that must be at most {LARGEST_STORAGE_BYTES} bytes, a single number's")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
