"""Python's search for garbage, and what need not be searched."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good(first: bool = True) -> Iterator[None]:
    """What is there after the block stays until the process ends: nothing is searched for garbage in it, or afterwards.

    For imports: torch's make some hundred thousand objects, which are otherwise gone through a dozen times on the way,
    and again in every later search.

    Args:
        first: False where the block has nothing new to make; then nothing is done.
    """
    searching = gc.isenabled()
    if not first or not searching:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
