"""Rows of local tables (tsv, parquet, JSON lines), and where to find them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.long_text import refuse_long_lines
from utils.errors import InputError
from utils.plain_json import parsed

Row = dict[str, Any]
FORMATS = ("tsv", "parquet", "jsonl", "json")
SHARD = r"(?:-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?)?"


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set may lie.

    Attributes:
        folders: Names of its own folder under the root, in small letters and digits only:
            `sst2` stands for `SST-2` and `sst2` alike. The root may be that folder itself.
        splits: Per split the names that its files may start with, the likeliest first.
    """

    folders: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]

    def find(self, root: Path, split: str) -> list[Path]:
        """The files of a split, several where it is sharded; none if there is none.

        Raises:
            InputError: If shards are missing.
        """
        own = (
            sorted(p for p in root.iterdir() if p.is_dir() and _plain(p.name) in self.folders) if root.is_dir() else []
        )
        for folder in (*own, root):
            for name in self.splits[split]:
                for suffix in FORMATS:
                    if found := _shards(folder, name, suffix):
                        return found
        return []

    def demand(self, root: Path, split: str) -> list[Path]:
        """The files of a split.

        Raises:
            InputError: If there are none, or shards are missing.
        """
        if found := self.find(root, split):
            return found
        names = ", ".join(f"{name}.tsv" for name in self.splits[split])
        raise InputError(
            f"data.root={root}: has no {split} split; looked there and in its folders {', '.join(self.folders)} for "
            f"{names} (or .parquet, .jsonl, .json in place of .tsv, or parquet shards such as "
            f"{self.splits[split][0]}-00000-of-00001.parquet)"
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _shards(folder: Path, name: str, suffix: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + SHARD + re.escape(f".{suffix}"))
    files = sorted(p for p in folder.glob(f"{name}*.{suffix}") if p.is_file())
    matches = [(path, match) for path in files if (match := pattern.fullmatch(path.name))]
    sizes = {int(match[2]) for _, match in matches if match[2]}
    if len(sizes) > 1 or (sizes and len({match[1] for _, match in matches if match[1]}) != max(sizes)):
        raise InputError(
            f"data.root: {folder} must hold every shard of {name}; found {', '.join(p.name for p in files)}"
        )
    return [path for path, match in matches if bool(match[2]) == bool(sizes)]


def read_rows(
    files: Sequence[Path], keep: Collection[str], header: Sequence[str] | None = None, broken_lines: int = 0
) -> tuple[list[Row], int]:
    """Read tables of one data set, one after the other.

    Args:
        files: `.tsv`, `.parquet`, `.jsonl` or `.json` (one object a line).
        keep: Columns to keep; those that a table lacks are left out.
        header: Names of a tsv's columns where its first line has none.
        broken_lines: Tsv lines with a wrong number of fields that are passed over.

    Returns:
        The rows, and how many lines were passed over.

    Raises:
        InputError: If a file can't be read as what its name says; it names the line.
    """
    rows: list[Row] = []
    passed_over = 0
    for path in files:
        try:
            if path.suffix == ".tsv":
                found, broken = _read_tsv(path, set(keep), header, broken_lines)
                rows, passed_over = rows + found, passed_over + broken
            else:
                rows += (
                    _read_parquet(path, set(keep)) if path.suffix == ".parquet" else _read_json_lines(path, set(keep))
                )
        except UnicodeDecodeError as error:
            raise InputError(f"data.root: {path} is not UTF-8 text: {error}") from error
    return rows, passed_over


def _lines(path: Path) -> list[str]:
    refuse_long_lines(path)
    # only line feeds end a line: texts hold other characters that Python would split at
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _read_tsv(path: Path, keep: set[str], header: Sequence[str] | None, allowed: int) -> tuple[list[Row], int]:
    """Quotes mean nothing in these files: a sentence may begin with one and never close it."""
    lines = _lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    if header is None and not lines:
        raise InputError(f"data.root: {path} is empty; its first line must name the columns")
    names = list(header) if header is not None else lines[0].split("\t")
    places = [(place, name) for place, name in enumerate(names) if name in keep]
    rows, broken = [], 0
    for number, line in enumerate(lines, start=1):
        if header is None and number == 1:
            continue
        fields = line.split("\t")
        if len(fields) == len(names):
            rows.append({name: fields[place] for place, name in places})
            continue
        broken += 1
        if broken > allowed:
            raise InputError(f"data.root: {path} line {number} has {len(fields)} fields; must be {len(names)}")
    return rows, broken


def _read_parquet(path: Path, keep: set[str]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        return table.read([name for name in table.schema_arrow.names if name in keep]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data.root: {path} is no parquet file: {str(error).splitlines()[0]}") from error


def _read_json_lines(path: Path, keep: set[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except ValueError as error:
            raise InputError(f"data.root: {path} line {number} must be one JSON object: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"data.root: {path} line {number} must be one JSON object")
        rows.append({name: value for name, value in row.items() if name in keep})
    return rows


def first_column(rows: Sequence[Row], names: Sequence[str], source: str) -> str:
    """The first of `names` that the rows have.

    Raises:
        InputError: If they have none of them.
    """
    there = rows[0].keys() if rows else names
    if found := next((name for name in names if name in there), None):
        return found
    raise InputError(f"{source} must have a column {' or '.join(names)}")


def text_of(row: Row, column: str, source: str) -> str:
    """A row's text without the white space around it.

    Raises:
        InputError: If there is none.
    """
    if isinstance(text := row.get(column), str):
        return text.strip()
    raise InputError(f"{source}: each row must have a text {column!r}; one has {text!r}")
