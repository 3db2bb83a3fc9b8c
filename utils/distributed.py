"""One run in several processes: who is first, work divided between them, results put together, and how errors end all.

Everything here does nothing in a single process. Results travel over gloo through main memory, as safetensors and
JSON, and are put together in the order in which a single process finds them, so that sums have the same bits.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

T = TypeVar("T")
# arrays by name, and plain values
Parcel = tuple[dict[str, Tensor], Any]
# bytes that travel at once
PIECE = 2**28


class PeerEnded(RuntimeError):
    """Another process of the run is gone."""


def world_size() -> int:
    """How many processes do this run together; 1 where there is one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def described() -> dict[str, Any]:
    """What a record says of the processes; nothing where there is one."""
    if world_size() == 1:
        return {}
    return {"world_size": world_size(), "backend": "nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"}


def divided(
    items: Iterable[T],
    work: Callable[[T], Parcel],
    owners: Sequence[int] | None = None,
    in_rounds: bool = False,
) -> Iterator[Parcel]:
    """Do some work for every item, each in one of the processes; all of them get all results, in the items' order.

    Args:
        items: The same in every process.
        work: What is done; must not ask the other processes for anything.
        owners: Rank that each item falls to; None: they take turns.
        in_rounds: Exchange results after every item a process, where all of them would take too much memory.
    """
    size = world_size()
    if size == 1:
        yield from map(work, items)
        return
    numbered = ((owners[n] if owners is not None else n % size, item) for n, item in enumerate(items))
    while part := list(islice(numbered, size)) if in_rounds else numbered:
        yield from _exchanged(part, work)
        if part is numbered:
            return


def _exchanged(owned: Iterable[tuple[int, T]], work: Callable[[T], Parcel]) -> Iterator[Parcel]:
    own, tensors, facts = rank(), dict[str, Tensor](), dict[str, Any]()
    for number, (owner, item) in enumerate(owned):
        if owner == own:
            arrays, facts[str(number)] = work(item)
            tensors |= {f"{number}/{name}": tensor for name, tensor in arrays.items()}
    found: dict[int, Parcel] = {}
    for arrays, plain in gathered((tensors, facts)):
        found |= {int(number): ({}, fact) for number, fact in plain.items()}
        for name, tensor in arrays.items():
            number, _, leaf = name.partition("/")
            found[int(number)][0][leaf] = tensor
    yield from (found[number] for number in sorted(found))


def own_share(count: int) -> int:
    """How many of so many items fall to this process where they take turns."""
    return len(range(rank(), count, world_size()))


class Turns:
    """Gives pieces of work of known sizes, one after the other, to the process that has least to do so far."""

    def __init__(self) -> None:
        self.loads = [0] * world_size()

    def own(self, size: int) -> bool:
        """Whether the next piece is this process's; to be asked by all of them, in the same order."""
        owner = self.loads.index(min(self.loads))
        self.loads[owner] += size
        return owner == rank()


def summed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes, each in the order of the ranks and on its own device."""
    if world_size() == 1:
        return dict(values)
    parts = [arrays for arrays, _ in gathered((dict(values), None))]
    totals = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in values}
    return {name: total.to(values[name].device) for name, total in totals.items()}


def gathered(parcel: Parcel) -> list[Parcel]:
    """What every process gives, in the order of the ranks, in all of them."""
    return [parcel] if world_size() == 1 else [_sent(parcel, source) for source in range(world_size())]


def from_first(make: Callable[[], Parcel]) -> Parcel:
    """Let the first process make something while the others wait; all get it."""
    if world_size() == 1:
        return make()
    return _sent(make() if is_first() else None, 0)


def received() -> Parcel:
    """What the first process sends by `from_first`."""
    return from_first(lambda: ({}, None))


def own_rows(count: int) -> slice:
    """This process's part of a batch's rows; parts differ by one row at most, and may be empty."""
    size, own = world_size(), rank()
    return slice(count * own // size, count * (own + 1) // size)


def _sent(parcel: Parcel | None, source: int) -> Parcel:
    """Send a parcel from one process to all; the sender keeps what it has."""
    content = _packed(parcel) if parcel is not None and source == rank() else b""
    length = torch.tensor([len(content)])
    _broadcast(length, source)
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
    if buffer is None:
        buffer = torch.empty(int(length), dtype=torch.uint8)
    for piece in buffer.split(PIECE):
        _broadcast(piece, source)
    tensors, facts = parcel if parcel is not None and source == rank() else _unpacked(buffer.numpy().tobytes())
    return dict(sorted(tensors.items())), facts  # the format has an order of its own


def _broadcast(tensor: Tensor, source: int) -> None:
    try:
        dist.broadcast(tensor, source)
    except RuntimeError as error:
        raise PeerEnded(str(error)) from error


def _packed(parcel: Parcel) -> bytes:
    tensors, facts = parcel
    # clones: tied tensors share memory, which the format can't hold
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"facts": json.dumps(facts)})


def _unpacked(content: bytes) -> Parcel:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), json.loads(header["__metadata__"]["facts"])
