"""Sizes that no machine has: refused while a model is built, before memory is taken or hours pass.

What a configuration or a checkpoint's manifest asks for is only known when it is built. The tensors are counted as
they are asked for, so that the one that is too much is never made.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import InputError

MOST_TENSORS = 50_000
LARGEST_NUMBER = 100_000_000
MOST_TURNOVER = 4  # some tensors only live while a model is built
FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace", "eye", "tril_indices"}
UNKNOWN_MEMORY = 2**40


def refuse_absurd_sizes(arguments: Any, where: str) -> None:
    """Raise an InputError if any whole number in a builder's arguments is beyond what a model can have."""
    for name, value in _numbers(arguments, ""):
        if abs(value) > LARGEST_NUMBER:
            raise InputError(f"{where}: {name}={value}: must be at most {LARGEST_NUMBER}")


@contextmanager
def bounded_building(what: str, most_bytes: int | None = None) -> Iterator[None]:
    """Refuse a tensor that would take more than there is while something is built.

    Args:
        what: Names it in the message, such as `model`.
        most_bytes: Of all tensors together; None: this machine's memory.

    Raises:
        InputError: If that is exceeded, or more than 50,000 tensors are made.
    """
    try:
        with _Counting(what, machine_memory() if most_bytes is None else most_bytes):
            yield
    except (MemoryError, OverflowError) as error:
        raise InputError(f"{what}: its sizes are more than this machine can hold: {error}") from error
    except RuntimeError as error:
        # what torch says where a size overflows or memory is refused, before or instead of the count
        if any(sign in str(error) for sign in ("can't allocate", "not enough memory", "overflow", "out of memory")):
            raise InputError(f"{what}: its sizes are more than this machine can hold: {_first(error)}") from error
        raise


def machine_memory() -> int:
    """Bytes of main memory, or a lot where that can't be known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return UNKNOWN_MEMORY


class _Counting(TorchDispatchMode):
    """Looks at the size that a factory function is asked for before it runs."""

    def __init__(self, what: str, most_bytes: int) -> None:
        super().__init__()
        self.what, self.most, self.tensors, self.total = what, most_bytes, 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be kept from torch's compiler, which nothing calls here and whose import takes a second or two."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func.overloadpacket.__name__ in FACTORIES:
            self._count(args, given)
        return func(*args, **given)

    def _count(self, args: Any, given: Mapping[str, Any]) -> None:
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise InputError(f"{self.what}: has more than {MOST_TENSORS} tensors; its depth or sizes must be smaller")
        if torch.device(given.get("device") or "cpu").type == "meta":
            return
        size = args[0] if args else ()
        count = math.prod(size) if isinstance(size, list | tuple | torch.Size) else int(size)
        width = (given.get("dtype") or torch.get_default_dtype()).itemsize
        self.total += count * width
        if self.total > MOST_TURNOVER * self.most:
            raise InputError(
                f"{self.what}: its tensors take more than {self.total:,} bytes together; "
                f"must fit the {self.most:,} bytes of this machine's memory"
            )
        if count * width > self.most:
            raise InputError(
                f"{self.what}: asks for a tensor of {count:,} numbers, {count * width:,} bytes; "
                f"must fit the {self.most:,} bytes of this machine's memory"
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
