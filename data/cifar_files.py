"""The original files of CIFAR-10 and CIFAR-100: binary records, and pickles read without running them.

Shapes: N images, pixels (N, 3, 32, 32) uint8, labels (N,) int64.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

PIXELS = 3 * 32 * 32


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
        found = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = found[b"data"], torch.tensor(found[PICKLED[classes].label], dtype=torch.int64)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), PIXELS)):
            raise ValueError(f"its data must be (images, {PIXELS}) uint8, one row a label")
    except InputError as error:
        raise InputError(f"data.root: {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"data.root: {path}: can't be read as a file of CIFAR-{classes}: {why}") from error
    return _checked(torch.from_numpy(pixels.copy()), labels, path, classes)


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2, and no other encoding."""
    if encoding != "latin1":
        raise InputError(f"asks for the encoding {encoding!r}; must be latin1")
    return text.encode("latin1")


PLAIN = {kind.__name__: kind for kind in (bytes, bytearray, str, int, float, bool, list, tuple, dict, set)}
REBUILD = np.empty(0).__reduce__()[0]  # numpy's own function, wherever its version keeps it
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD,
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
