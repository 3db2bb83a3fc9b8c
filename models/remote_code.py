"""Folders that bring code of their own: it is never run, so that they are refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.plain_json import read_json

FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
LARGEST_BYTES = 64 * 2**20


def refuse_remote_code(folder: Path) -> None:
    """Raise an InputError if a folder in transformers' format names code of its own, or a configuration is damaged."""
    for path in (folder / name for name in FILES):
        if not path.is_file():
            continue
        try:
            found = read_json(path, LARGEST_BYTES)
        except (ValueError, OSError) as error:
            raise InputError(f"model.checkpoint={folder}: {path.name} is damaged: {error}") from error
        if key := _code_key(found):
            raise InputError(
                f"model.checkpoint={folder}: {path.name} has {key}, code of its own, which is never run; it must be a "
                "model that transformers itself knows, without that key"
            )


def _code_key(found: Any) -> str | None:
    """The key that names code, at the top or in one of the parts of a model."""
    if not isinstance(found, Mapping):
        return None
    parts = [found, *(part for part in found.values() if isinstance(part, Mapping))]
    return next((key for part in parts for key in KEYS if part.get(key)), None)
