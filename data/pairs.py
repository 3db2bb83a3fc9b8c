"""Images with their label maps, from folders or from rows of a hub data set; decoded when asked for."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from data.base import fingerprint_of
from data.image_files import open_image
from data.label_maps import IGNORED, Table, read_label_map
from utils.errors import InputError
from utils.progress import progress_bar

NAMED = 3  # files that a message names before it counts
TAIL = 64  # bytes; a PNG's last ones hold checksums of all its pixels


class Pairs(Protocol):
    """The images and label maps of one split, not decoded yet."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image or a label map does."""
        ...

    @property
    def title(self) -> str:
        """What to call the split in a message."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in a message: its path where it has one."""
        ...

    def image(self, index: int) -> Image.Image:
        """Open an image; raises whatever its decoder raises."""
        ...

    def label_name(self, index: int) -> str:
        """What to call an image's label map in a message."""
        ...

    def label(self, index: int) -> tuple[Image.Image, Table]:
        """Open a label map; with it comes what its values mean."""
        ...

    def some(self, rows: Sequence[int]) -> Self:
        """The split with only these pairs."""
        ...


@dataclass(frozen=True)
class PairFiles:
    """Pairs of files.

    Attributes:
        root: What their paths are relative to.
        files: Image, label map, and what its values mean.
        title: What to call the split in a message.
        whole: Whether the fingerprint reads every byte; else names, sizes and the last bytes, where a PNG has
            checksums of its pixels.
    """

    root: Path
    files: Sequence[tuple[str, str, Table]]
    title: str
    whole: bool = False

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Hash of relative paths and contents, and of what labels mean."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts: list[str] = []
        for image, labels, table in self.files:
            parts += [image, self._digest(image), labels, self._digest(labels), _meaning(table)]
        return fingerprint_of(*parts)

    def _digest(self, path: str) -> str:
        with (self.root / path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0 if self.whole else max(0, size - TAIL))
            return f"{size}:{hashlib.sha256(file.read()).hexdigest()}"

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.files[index][0])

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        return open_image(self.root / self.files[index][0])

    def label_name(self, index: int) -> str:
        """The label map's path."""
        return str(self.root / self.files[index][1])

    def label(self, index: int) -> tuple[Image.Image, Table]:
        """Open a label map."""
        return open_image(self.root / self.files[index][1]), self.files[index][2]

    def some(self, rows: Sequence[int]) -> "PairFiles":
        """The split with only these pairs."""
        return replace(self, files=[self.files[row] for row in rows])


@dataclass(frozen=True)
class PairRows:
    """Rows of a hub data set that hold an encoded image and its encoded label map.

    Attributes:
        rows: The split, its images not decoded.
        columns: Of the image, and of the label map.
        table: What labels mean.
        title: What to call the split in a message.
    """

    rows: Any
    columns: tuple[str, str]
    table: Table
    title: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """The library's own hash of the split, and what labels mean."""
        return fingerprint_of(str(self.rows._fingerprint), *self.columns, _meaning(self.table))

    def name(self, index: int) -> str:
        """The split and the row's number."""
        return f"{self.title} row {index}"

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        return self._opened(index, self.columns[0])

    def label_name(self, index: int) -> str:
        """The split, the row's number and the column."""
        return f"{self.title} row {index}, {self.columns[1]}"

    def label(self, index: int) -> tuple[Image.Image, Table]:
        """Open a label map."""
        return self._opened(index, self.columns[1]), self.table

    def some(self, rows: Sequence[int]) -> "PairRows":
        """The split with only these rows."""
        return replace(self, rows=self.rows.select(list(rows)))

    def _opened(self, index: int, column: str) -> Image.Image:
        stored = self.rows[index][column]
        return open_image(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))


def read_pair(pairs: Pairs, index: int) -> tuple[Image.Image, np.ndarray]:
    """Decode an image and its label map; what EXIF says of its orientation is left out, as labels know none.

    Returns:
        The image in RGB, and classes (H, W) uint8, 255 where there is none.

    Raises:
        InputError: If one can't be read, they differ in size, or a label is none; it names the file.
    """
    title = pairs.label_name(index)
    with _readable(pairs.name(index)), pairs.image(index) as opened:
        image = opened.convert("RGB")
    with _readable(title):
        opened, table = pairs.label(index)
        with opened:
            labels = read_label_map(opened, table, title)
    if image.size != (labels.shape[1], labels.shape[0]):
        raise InputError(
            f"{title}: is {labels.shape[1]}x{labels.shape[0]} pixels, its image {pairs.name(index)} is "
            f"{image.width}x{image.height}; the two must be of one size"
        )
    return image, labels


def _meaning(table: Table) -> str:
    """Hash of what labels mean."""
    return hashlib.sha256(table.tobytes()).hexdigest()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a message that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise InputError(f"{name}: can't be read: {type(error).__name__}: {error}") from error


def labelled_pixels(pairs: Pairs, classes: int, threads: int) -> np.ndarray:
    """Decode every pair once: what can't be used is refused, what can is counted.

    Returns:
        Pixels of each class over the split, (C,) int64.

    Raises:
        InputError: Of the first pair that can't be used.
    """

    def count(index: int) -> np.ndarray:
        return np.bincount(read_pair(pairs, index)[1].ravel(), minlength=IGNORED + 1)

    total = np.zeros(IGNORED + 1, dtype=np.int64)
    with progress_bar(f"check {pairs.title}", len(pairs)) as advance, ThreadPoolExecutor(threads) as pool:
        try:
            for found in pool.map(count, range(len(pairs))):
                total += found
                advance("")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all the others are decoded first
            raise
    return total[:classes]


def paired(images: Iterable[tuple[str, str]], labels: Iterable[tuple[str, str]], where: str) -> list[tuple[str, str]]:
    """Match image and label files by their keys, in the order of the keys.

    Args:
        images: Key and path of each image.
        labels: Key and path of each label map.
        where: The split's folders, for a message.

    Raises:
        InputError: If there is none, one has no partner, or two have the same key; it names them.
    """
    first, second = _by_key(images, where), _by_key(labels, where)
    for lonely, what, other in (
        ([first[key] for key in sorted(first.keys() - second.keys())], "images", "label map"),
        ([second[key] for key in sorted(second.keys() - first.keys())], "label maps", "image"),
    ):
        if lonely:
            more = f" and {len(lonely) - NAMED} more" if len(lonely) > NAMED else ""
            raise InputError(f"data.root: {where}: {what} without their {other}: {', '.join(lonely[:NAMED])}{more}")
    if not first:
        raise InputError(f"data.root: {where}: holds no image with a label map")
    return [(first[key], second[key]) for key in sorted(first)]


def _by_key(files: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, path in files:
        if key in found:
            raise InputError(f"data.root: {where}: {found[key]} and {path} have the same name; one must go")
        found[key] = path
    return found


def listed(root: Path, folder: str, endings: Sequence[str]) -> list[str]:
    """Paths of the files below a folder of `root` that end so, relative to it and in order; hidden ones left out.

    Args:
        root: The data set.
        folder: In it; its own files and those of its folders are listed.
        endings: Such as `.jpg`, in any case.
    """
    found, seen = [], set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        # a link may lead back to a folder that it lies in
        if (real := os.path.realpath(place)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(place).relative_to(root)
        chosen = (name for name in files if not name.startswith(".") and name.lower().endswith(tuple(endings)))
        found += [str(inside / name) for name in chosen]
    return sorted(found)


def refuse_other_layout(root: Path, folders: Sequence[str]) -> None:
    """Raise an InputError if a data set's folder does not hold all of these."""
    if missing := [folder for folder in folders if not (root / folder).is_dir()]:
        raise InputError(f"data.root={root}: has no folder {missing[0]}; must hold {', '.join(folders)}")
