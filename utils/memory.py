"""Going on with less at once where memory runs out, and telling whoever keeps a record.

Two ways: `Portions` cuts single pieces of work, whose results are put together by the caller; `restarted` does all of
the work again with less at once, for work that adds up while it runs.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.distributed import world_size

log = logging.getLogger(__name__)

T = TypeVar("T")
# torch has no class of its own for these
MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Shortage:
    """Memory was too small for some work, which went on with less at once.

    Attributes:
        work: What was done.
        things: What it was done to: `samples`, `candidates`.
        size: So many at once did not fit.
        smaller: So many were tried next.
    """

    work: str
    things: str
    size: int
    smaller: int


_noted: ContextVar[list[Shortage] | None] = ContextVar("shortages", default=None)


@contextmanager
def shortages() -> Iterator[list[Shortage]]:
    """Collect what memory was too small for inside a `with`."""
    found: list[Shortage] = []
    before = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(before)


def described(found: Shortage) -> str:
    """A sentence on it."""
    left = f"it went on with {found.smaller} at once"
    return f"Memory was too small for {found.size} {found.things} in {found.work}: {left}; results are the same."


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory was too small, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
    )


class Portions:
    """Does work on so many things at once as fit; what did not fit is not tried again.

    Args:
        work: What is done, in words.
        things: What it is done to.
        most: How many to try at once; None for all of them.
        forget: Called before going on, to let go of what can be made again.
    """

    def __init__(
        self, work: str, things: str = "samples", most: int | None = None, forget: Callable[[], Any] | None = None
    ) -> None:
        self.work, self.things, self.most = work, things, most
        self.forget = forget

    def each(self, count: int, do: Callable[[range], T]) -> Iterator[T]:
        """Do the work on all things, in their order.

        Args:
            count: How many there are; for none of them it is done once, on nothing.
            do: The work on some of them. It must leave no trace if it fails.

        Raises:
            Exception: What `do` raises, unless it is for want of memory and there are fewer to be tried.
        """
        first = 0
        while first < count or first == count == 0:
            size = min(count - first, self.most or count)
            try:
                found = do(range(first, first + size))
            except Exception as error:
                self.most = _fewer(error, self.work, self.things, size)
            else:
                yield found
                if not count:
                    return
                first += size
                continue
            # outside of the handler: its error holds what was made on the way
            if self.forget is not None:
                self.forget()
            let_go()


def restarted(work: str, size: int, do: Callable[[int], T], things: str = "samples") -> T:
    """Do all of some work with `size` things at once; where memory runs out, from the beginning with half as many.

    One of several processes does not begin again: the others would wait for it.

    Raises:
        Exception: What `do` raises, unless it is for want of memory and fewer can be tried.
    """
    while True:
        try:
            return do(size)
        except Exception as error:
            if world_size() > 1:
                raise
            size = _fewer(error, work, things, size)
        let_go()


def let_go() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def rows_of(batch: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
    """Some samples of a batch, without a copy."""
    return {name: tensor[rows.start : rows.stop] for name, tensor in batch.items()}


def _fewer(error: Exception, work: str, things: str, size: int) -> int:
    """Half as many, noted; or the error again."""
    if size <= 1 or not out_of_memory(error):
        raise error
    found = Shortage(work, things, size, size // 2)
    log.warning("%s", described(found))
    if (noted := _noted.get()) is not None and found not in noted:
        noted.append(found)
    return found.smaller
