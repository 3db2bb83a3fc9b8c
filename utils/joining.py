"""Joining the processes of one run, and ending them together: one message, the same exit code.

Whoever fails leaves word in the key-value store that the launcher gives them, and closes its connections, so that
the others don't wait for it; they fail with the same error, and the first process says it.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from utils.distributed import PeerEnded
from utils.errors import InputError, RunError
from utils.launched import Launch, launched

# as good as none: a process may wait for days while the first one measures
PATIENCE = timedelta(days=20)
# what the first process gets to take an error over
TO_HEAR_S = 10.0
KINDS: dict[str, type[BaseException]] = {e.__name__: e for e in (InputError, RunError, KeyboardInterrupt)}
GONE = ("gloo", "NCCL", "nccl", "Connection closed", "Connection reset", "Broken pipe")
UNSAID = "another process of this run ended, or the launcher ended all; the launcher's own messages say which"


class Terminated(RuntimeError):
    """The launcher asked this process to end."""


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Do what is in a `with` together with the other processes that `torchrun` started; nothing in a single one.

    Args:
        device: `auto`, `cpu` or `cuda`; with CUDA each process on a machine takes a GPU of its own.

    Raises:
        InputError: If there are fewer GPUs than processes; or as another process raised it.
        RunError: As another process raised it, or because one is gone.
    """
    place = launched()
    if place is None or dist.is_initialized():
        yield
        return
    store = _store(place)
    before = _on_termination(_terminate)
    try:
        with _silent(place), warnings.catch_warnings():
            # a gradient of one row, laid out otherwise than its weight
            warnings.filterwarnings("ignore", "Grad strides do not match")
            _start(place, device, store)
            yield
            dist.barrier()
    except BaseException as error:
        _on_termination(signal.SIG_IGN)  # on its way out anyway, with something to write and to say
        ended = _common(error, store, place)
        if ended is error:
            raise
        raise ended from error
    else:
        _on_termination(before)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(place: Launch) -> Store:
    """Keys of this run; a process may do several runs one after the other."""
    store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    number = store.add(f"pare/{place.rank}", 1)
    return PrefixStore(f"pare/run{number}", store)


def _start(place: Launch, device: str, store: Store) -> None:
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", place.world)), torch.cuda.device_count()
        if here > count:
            rule = "each process needs one; start fewer, or use device=cpu"
            raise InputError(f"device={device}: {here} processes on this machine and {count} GPUs; {rule}")
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    group = PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world, timeout=PATIENCE)
    dist.barrier()  # all are connected before one of them can fail


@contextmanager
def _silent(place: Launch) -> Iterator[None]:
    """Let the first process alone print."""
    if place.rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _terminate(number: int, frame: Any) -> None:
    raise Terminated("SIGTERM")


def _on_termination(handler: Any) -> Any:
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, handler)
    return None


def _common(error: BaseException, store: Store, place: Launch) -> BaseException:
    """The error that all processes end with; the first one to fail says which."""
    theirs = _is_of_others(error)
    found = _said(store, wait=theirs) if theirs else None
    if not theirs:
        word = {"kind": type(error).__name__, "text": str(error), "rank": place.rank}
        _tried(lambda: store.compare_set("error", "", json.dumps(word)))
    if dist.is_initialized():
        _let_go(error)
        dist.destroy_process_group()  # closes its connections: whoever waits for it fails
    if theirs:
        error = RunError(UNSAID) if found is None else _raised(found)
    if place.rank == 0:
        _tried(lambda: store.set("heard", "1"))
        return error
    # one that is busy says it as soon as the launcher ends it; one that is gone can't
    if not _heard(store) and theirs and _tried(lambda: store.add("speaker", 1)) == 1:
        print(error, file=sys.stderr, flush=True)
    return error if isinstance(error, tuple(KINDS.values())) else RunError(f"{type(error).__name__}: {error}")


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: with a reference to the group its connections would stay open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_of_others(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    if isinstance(error, PeerEnded | Terminated | dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in GONE)


def _raised(word: dict[str, Any]) -> BaseException:
    kind, text = KINDS.get(word["kind"]), word["text"]
    if kind is not None:
        return kind(text)
    return RunError(f"process {word['rank']}: {word['kind']}: {text}")


def _said(store: Store, wait: bool) -> dict[str, Any] | None:
    """What the process that failed left word of; it may take a moment."""
    until = time.monotonic() + (5.0 if wait else 0.0)
    while not _tried(lambda: store.check(["error"])):
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)
    return json.loads(store.get("error"))


def _heard(store: Store) -> bool:
    """Wait until the first process has taken the error over."""
    until = time.monotonic() + TO_HEAR_S
    while time.monotonic() < until:
        if _tried(lambda: store.check(["heard"])):
            return True
        time.sleep(0.05)
    return False


def _tried(ask: Any) -> Any:
    """Ask the store, which may be gone as well."""
    try:
        return ask()
    except RuntimeError:
        return None
