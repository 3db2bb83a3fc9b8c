"""Files of settings from elsewhere, looked at before Hydra reads them: a small one can stand for any number of values.

An anchor in YAML may be named many times, also inside other anchors; what is read holds a copy for each.
"""

from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import yaml

from utils.check import MOST_DEEP, MOST_VALUES

# options of `hydra/sweeper/sampler` lie deepest
LEVELS = 4
MOST_BYTES = 2**20
OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)


def config_file_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the `*.yaml` files of a folder of configurations, however it is used."""
    for level in range(LEVELS):
        for path in sorted(folder.glob(f"{'*/' * level}*.yaml")):
            if why := _why_refused(path):
                yield f"{path}: {why}"


def searched_folders(primary: Path) -> list[Path]:
    """Folders that a primary configuration puts on Hydra's search path; none where it can't be read."""
    if _why_refused(primary) is not None:
        return []
    try:
        plain = yaml.safe_load(primary.read_text(encoding="utf-8"))
        places = plain["hydra"]["searchpath"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return []
    named = [place for place in places if isinstance(place, str)] if isinstance(places, list) else []
    return [Path(place.removeprefix("file://")) for place in named if not place.startswith("pkg://")]


def _why_refused(path: Path) -> str | None:
    try:
        state = path.stat()
        if not S_ISREG(state.st_mode):
            return "must be an ordinary file"
        if state.st_size > MOST_BYTES:
            return f"has {state.st_size} bytes; a configuration must have at most {MOST_BYTES}"
        return why_too_large(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"


def why_too_large(text: str) -> str | None:
    """Say why a YAML text stands for too much, or None if it does not; what is no YAML is left to its reader.

    Its events are counted as they come, so that nothing is ever expanded.
    """
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    total = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, OPENING):
                opened.append((event.anchor, total))
            if isinstance(event, yaml.AliasEvent):
                total += sizes.get(event.anchor, 1)
            elif isinstance(event, (yaml.ScalarEvent, *OPENING)):
                total += 1
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                sizes |= {anchor: total - before} if anchor else {}
            if total > MOST_VALUES or len(opened) > MOST_DEEP:
                return f"must be at most {MOST_VALUES} values, at most {MOST_DEEP} deep, with all anchors followed"
    except yaml.YAMLError:
        return None
    return None
