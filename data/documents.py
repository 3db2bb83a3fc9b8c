"""Local files that hold texts: plain, parquet or JSON lines, packed or not."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from data.long_text import refuse_long_lines, refuse_long_text
from data.tables import read_rows
from utils.errors import InputError
from utils.plain_json import parsed

COLUMN = "text"
SUFFIXES = (".txt", ".raw", ".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")


def split_files(root: Path, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Files of a split, by name: those that have the first of `names` that any has as a word.

    Args:
        root: Their folder.
        names: Such as `validation`, `test`.
        suffixes: What their names may end with.
    """
    files = (
        sorted(p for p in root.iterdir() if p.is_file() and p.name.endswith(tuple(suffixes))) if root.is_dir() else []
    )
    for name in names:
        word = re.compile(rf"(?:^|[^a-z0-9]){name}(?![a-z])", re.IGNORECASE)
        if found := [path for path in files if word.search(path.name)]:
            return found
    return []


def demanded_files(root: Path, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The same.

    Raises:
        InputError: If there are none.
    """
    if found := split_files(root, names, suffixes):
        return found
    wanted = " or ".join(f"{name}*" for name in names)
    raise InputError(f"data.root={root}: must be a folder with a file {wanted} ({', '.join(suffixes)}); it has none")


def content_hash(files: Sequence[Path]) -> str:
    """Hash of files by content and name, wherever they lie."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}|".encode())
    return digest.hexdigest()


def read_texts(path: Path) -> list[str]:
    """Texts of a file: all of a plain one as a single text, one a row or line of the others.

    Raises:
        InputError: If the file can't be read as what its name says, or has no column `text`.
    """
    if path.suffix != ".parquet":
        refuse_long_lines(path)
    if path.suffix in (".txt", ".raw"):
        return [_plain(path)]
    rows = _packed_rows(path) if path.suffix == ".gz" else read_rows([path], {COLUMN})[0]
    texts = [row.get(COLUMN) for row in rows]
    if bad := [number for number, text in enumerate(texts, start=1) if not isinstance(text, str)]:
        raise InputError(f"data.root: {path} row {bad[0]} must have a text {COLUMN!r}")
    for text in texts:
        refuse_long_text(text, f"data.root: {path}")  # type: ignore[arg-type]
    return texts  # type: ignore[return-value]


def _plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data.root: {path} is not UTF-8 text: {error}") from error


def _packed_rows(path: Path) -> list[dict]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"data.root: {path} is damaged or no gzip file of UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [parsed(line)] if line.strip() else []
        except ValueError as error:
            raise InputError(f"data.root: {path} line {number} must be one JSON object: {error}") from error
    return [row if isinstance(row, dict) else {} for row in rows]
