"""Weights that lie in several files: what an index names must be there."""

from pathlib import Path

from utils.errors import InputError
from utils.plain_json import read_json

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")


def refuse_missing_shards(folder: Path) -> None:
    """Raise an InputError that names every file which a folder's index lists and the folder lacks.

    A folder that holds its weights in one file, or that has no index, is not looked at further.
    """
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is None or any((folder / name).is_file() for name in WHOLE):
        return
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is no name of a file in this folder")
        missing = [name for name in files if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model.checkpoint={folder}: {index.name} is damaged ({error!r})") from error
    if missing:
        rule = f"must hold all {len(files)} files that {index.name} names"
        raise InputError(f"model.checkpoint={folder}: {rule}; missing: {', '.join(missing)}")
