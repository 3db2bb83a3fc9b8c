"""Data sets of the Hugging Face hub, from its cache on this machine where they are there."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from utils.hub import from_cache_or_hub


def hub_splits(name: str, data: str, instead: str, config: str | None = None, revision: str | None = None) -> Any:
    """Load all splits of a data set.

    Args:
        name: Such as `uoft-cs/cifar10`; or a folder in a format that the library reads.
        data: What `data=` was set to, for the message.
        instead: How to provide it without the hub.
        config: Which of its configurations; None for its only one.
        revision: Which of its revisions; None for the newest.

    Raises:
        InputError: If it is neither here nor at the hub, or the hub can't be reached.
    """
    chosen = [name] if config is None else [name, config]
    more = {} if revision is None else {"revision": revision}
    return from_cache_or_hub(lambda local: _loaded(local, *chosen, **more), f"data={data} ({name})", instead)


def hub_rows(
    name: str, config: str | None, split: str, keep: Collection[str], what: str, instead: str
) -> list[dict[str, Any]]:
    """Rows of one split of a data set.

    Args:
        name: Such as `nyu-mll/glue`.
        config: Which of its configurations.
        split: As the hub calls it.
        keep: Columns to keep.
        what: What is loaded and the key that named it, for the message.
        instead: How to provide it without the hub.

    Raises:
        InputError: If it is neither here nor at the hub, or the hub can't be reached.
    """
    table = from_cache_or_hub(lambda local: _loaded(local, name, config, split=split), what, instead)
    return table.select_columns([column for column in table.column_names if column in keep]).to_list()


def _loaded(local: bool, *args: Any, **kwargs: Any) -> Any:
    import datasets  # only here: it takes longer to import than a folder to list

    try:
        with _quietly(datasets, local):
            return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError):
        raise
    except Exception as error:  # its own errors and those of its HTTP client have no base in common
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _quietly(datasets: Any, local: bool) -> Iterator[None]:
    """Without the library's warnings, whose content is in the error if it comes to one, and local if so asked."""
    from datasets.utils import logging

    offline, verbosity = datasets.config.HF_HUB_OFFLINE, logging.get_verbosity()
    logging.set_verbosity_error()
    # no argument of load_dataset keeps it from asking the hub first, five times over
    datasets.config.HF_HUB_OFFLINE = offline or local
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
