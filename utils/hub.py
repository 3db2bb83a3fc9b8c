"""Asking the Hugging Face hub only when it can answer: one short probe, never a retry loop."""

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from utils.errors import InputError

T = TypeVar("T")
SECONDS_TO_WAIT = 5.0
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@cache
def reachable() -> bool:
    """Whether the hub answers, proxies and HF_ENDPOINT honoured; asked once a process."""
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE_SWITCHES):
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS_TO_WAIT).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only to refuse a bare request
    except (OSError, ValueError):
        return False
    return True


def from_cache_or_hub(load: Callable[[bool], T], what: str, instead: str) -> T:
    """Load something that has a hub name: from this machine's cache, or else from the hub.

    Args:
        load: Called with whether it must stay local; raises OSError or ValueError where it can't.
        what: What is loaded and the key that named it, such as `model.name=bert-base-uncased`.
        instead: How to provide it without the hub, such as `model.checkpoint=<folder>`.

    Raises:
        InputError: If it is neither here nor at the hub, or the hub can't be reached.
    """
    try:
        return load(True)
    except (OSError, ValueError) as error:
        if not reachable():
            raise InputError(
                f"{what}: is not on this machine and the Hugging Face hub cannot be reached; run once with "
                f"network access (it is then kept in the hub's cache), or give {instead}"
            ) from error
    try:
        return load(False)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}: the hub has no such thing, or refuses it: {first}; or give {instead}") from error
