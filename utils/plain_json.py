"""JSON from files that anybody may have written: bounded, without NaN, and with one kind of error."""

import json
from pathlib import Path
from typing import Any, NoReturn

LARGEST_BYTES = 256 * 2**20


def parsed(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, nests too deeply, or holds NaN or infinity, which JSON has not.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def read_json(path: Path, largest: int = LARGEST_BYTES) -> Any:
    """The same of a file.

    Raises:
        OSError: If it can't be read.
        ValueError: As `parsed`, or if it has more than `largest` bytes.
    """
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"it has {size} bytes; must have at most {largest}")
    return parsed(path.read_bytes())


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")
