"""The original files of CIFAR-10 and CIFAR-100: binary records, and pickles read without running them.

Shapes: N images, pixels (N, 3, 32, 32) uint8, labels (N,) int64.
"""

import io
import pickle
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

PIXELS = 3 * 32 * 32
LARGEST_BYTES = 512 * 2**20  # CIFAR-100's training pickle has 155 MB


@dataclass(frozen=True)
class Layout:
    """Names in one of the archives: its folder, its files, and how its labels are stored.

    Attributes:
        folder: The archive's own folder.
        train: Pattern of the training files.
        test: The test file.
        label: Bytes before the pixels of a binary record, or the labels' key in a pickle.
    """

    folder: str
    train: str
    test: str
    label: int | bytes


BINARY = {
    10: Layout("cifar-10-batches-bin", "data_batch_[1-5].bin", "test_batch.bin", 1),
    100: Layout("cifar-100-binary", "train.bin", "test.bin", 2),
}
PICKLED = {
    10: Layout("cifar-10-batches-py", "data_batch_[1-5]", "test_batch", b"labels"),
    100: Layout("cifar-100-python", "train", "test", b"fine_labels"),
}


def read_records(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Read a binary file: records of one label byte (CIFAR-100: coarse, fine), then red, green and blue rows.

    Returns:
        Pixels (N, 3, 32, 32) uint8 and labels (N,) int64.

    Raises:
        InputError: If the file is no whole number of records, or a label no class.
    """
    raw, size = path.read_bytes(), int(BINARY[classes].label) + PIXELS
    if not raw or len(raw) % size:
        raise InputError(
            f"data.root: {path}: has {len(raw)} bytes; must be a multiple of {size}, CIFAR-{classes}'s record, above 0"
        )
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, size)
    return _checked(records[:, -PIXELS:], records[:, -PIXELS - 1].long(), path, classes)


def read_pickle(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Read a file of the python version, letting in nothing but plain values and arrays.

    Returns:
        Pixels (N, 3, 32, 32) uint8 and labels (N,) int64.

    Raises:
        InputError: If it holds anything else, or is damaged.
    """
    try:
        content = _content(path)
        found = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = found[b"data"], torch.tensor(found[PICKLED[classes].label], dtype=torch.int64)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), PIXELS)):
            raise ValueError(f"its data must be (images, {PIXELS}) uint8, one row a label")
    except InputError as error:
        raise InputError(f"data.root: {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"data.root: {path}: can't be read as a file of CIFAR-{classes}: {why}") from error
    return _checked(torch.from_numpy(pixels.copy()), labels, path, classes)


def _content(path: Path) -> bytes:
    """The bytes of a pickle without instructions that set memory aside before anything is read."""
    if (size := path.stat().st_size) > LARGEST_BYTES:
        raise InputError(f"has {size} bytes; must have at most {LARGEST_BYTES}")
    content = path.read_bytes()
    for opcode, argument, at in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > int(at or 0):
            raise InputError(f"numbers an object {argument} at byte {at}; must be at most that")
    return content


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2, and no other encoding."""
    if encoding != "latin1":
        raise InputError(f"asks for the encoding {encoding!r}; must be latin1")
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: str = "latin1") -> bytes:
    """Bytes from bytes or text; from a number they would be that many zeros."""
    if isinstance(content, str):
        return _latin(content, encoding)
    if not isinstance(content, bytes | list):
        raise InputError("makes bytes of a number; must hold their content")
    return bytes(content)


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What numpy starts an array from before its state, which has as many numbers as there are bytes."""
    if kind is not ARRAY or shape != (0,) or code not in (b"b", "b"):
        raise InputError("starts an array at a size of its own; must give its content")
    return np.empty(0, dtype=np.int8)


def _dtype(name: Any = None, *flags: Any) -> np.dtype:
    """A type of plain numbers."""
    text = name.decode("latin1") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise InputError("has an array of another type; must hold plain numbers")
    return np.dtype(text, False, True)  # a copy: a pickle sets the state of what it made


ARRAY = "numpy.ndarray"  # stands for the class, which could itself be called with any size
NUMBER = re.compile(r"[<>|=]?[biuf][1248]")
PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, dict, set)}
PLAIN |= {"bytes": _bytes, "bytearray": _bytes}
ADMITTED = {
    ("numpy", "ndarray"): ARRAY,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy._core.multiarray", "_reconstruct"): _empty,
    ("_codecs", "encode"): _latin,
    **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in PLAIN.items()},
}


class _PlainUnpickler(pickle.Unpickler):
    """Knows what plain values and arrays are rebuilt from, and refuses every other name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ADMITTED:
            raise InputError(f"asks for {module_name}.{global_name}; must hold plain values and arrays alone")
        return ADMITTED[module_name, global_name]


def _checked(pixels: Tensor, labels: Tensor, path: Path, classes: int) -> tuple[Tensor, Tensor]:
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"data.root: {path}: has labels from {labels.min()} to {labels.max()}; must be below {classes}"
        )
    return pixels.reshape(-1, 3, 32, 32), labels
