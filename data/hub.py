"""Data sets of the Hugging Face hub, from its cache on this machine where they are there."""

from typing import Any

from utils.hub import from_cache_or_hub


def hub_splits(name: str, data: str, instead: str) -> Any:
    """Load a data set's splits from the Hugging Face hub, or from its cache on this machine.

    Raises:
        InputError: If it is in neither.
    """
    import datasets  # only here: it takes longer to import than a folder to list
    import datasets.config as settings

    def load(local: bool) -> Any:
        before = settings.HF_HUB_OFFLINE
        # no argument of load_dataset keeps it from asking the hub first, five times over
        settings.HF_HUB_OFFLINE = before or local
        try:
            return datasets.load_dataset(name)
        except (OSError, ValueError):
            raise
        except Exception as error:  # its own errors and those of its HTTP client have no base in common
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            settings.HF_HUB_OFFLINE = before

    return from_cache_or_hub(load, f"data={data} ({name})", instead)
