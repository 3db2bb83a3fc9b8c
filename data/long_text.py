"""Lines and texts that no tokenizer should be given: found before they are read into memory as a whole.

A tokenizer keeps about a hundred bytes a token, so that a line of a hundred million characters takes gigabytes.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

LONGEST_LINE = 2**24  # characters are counted as bytes; WikiText-103's longest line has 20,000
LARGEST_UNPACKED = 8 * 2**30
PIECE = 2**20


def refuse_long_lines(path: Path, longest: int = LONGEST_LINE) -> None:
    """Raise an InputError that names the first line of a file, packed or not, with more than `longest` bytes."""
    number, length = 1, 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for piece in _pieces(file, path):
            first, *others = piece.split(b"\n")
            length += len(first)
            for line in others:
                _refuse(path, number, length, longest)
                number, length = number + 1, len(line)
            _refuse(path, number, length, longest)


def refuse_long_text(text: str, source: str, longest: int = LONGEST_LINE) -> None:
    """Raise an InputError if one text of a table has more than `longest` characters."""
    if len(text) > longest:
        raise InputError(f"{source}: a text has {len(text):,} characters; must have at most {longest:,}")


def _pieces(file: Any, path: Path) -> Iterator[bytes]:
    total = 0
    try:
        while piece := file.read(PIECE):
            total += len(piece)
            if total > LARGEST_UNPACKED:
                raise InputError(f"data.root: {path}: is larger than {LARGEST_UNPACKED:,} bytes unpacked; must be less")
            yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data.root: {path} is damaged or no file that can be read: {error}") from error


def _refuse(path: Path, number: int, length: int, longest: int) -> None:
    if length > longest:
        raise InputError(
            f"data.root: {path} line {number} has at least {length:,} characters; must have at most {longest:,}"
        )
