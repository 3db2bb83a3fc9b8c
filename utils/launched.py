"""What `torchrun` says of a process in its environment; read before torch is imported."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

# a launcher that sees one process fail ends the others; this long they wait for that
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Launch:
    """One of several processes that were started to do one run together.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number on its own machine.
    """

    rank: int
    world: int
    local_rank: int


def launched() -> Launch | None:
    """This process's place in its run; None where it is the only one."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and world.isdigit() and "MASTER_ADDR" in os.environ) or int(world) < 2:
        return None
    return Launch(int(rank), int(world), int(os.environ.get("LOCAL_RANK", rank)))


def speaks() -> bool:
    """Whether this process prints: the only one, or the first."""
    found = launched()
    return found is None or found.rank == 0


def follower_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of a process that is not the first: Hydra must write and log nothing of its own.

    What is put in stands behind the last override, since options may follow it.
    """
    own = ("hydra.run.dir=", "hydra.output_subdir=", "hydra/job_logging=", "hydra/hydra_logging=")
    given = [argument for argument in arguments if not argument.startswith(own)]
    settings = (tempfile.gettempdir(), "null", "disabled", "disabled")
    quiet = [f"{key}{value}" for key, value in zip(own, settings, strict=True)]
    last = max((at for at, argument in enumerate(given) if "=" in argument and argument[0] != "-"), default=-1)
    return [*given[: last + 1], *quiet, *given[last + 1 :]] if last >= 0 else [*given, *quiet]


def note_termination() -> list[int]:
    """From now on only write down that the launcher asked this process to end; returns where."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return asked


def heed_termination(asked: Sequence[int]) -> None:
    """End if the launcher has asked for it, or as soon as it does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked:
        sys.exit(128 + asked[0])


def leave_after_first(code: int, asked: Sequence[int] = ()) -> NoReturn:
    """End a process that has nothing to say, but not before the first one has said it.

    The launcher ends all others as soon as one fails: one that was quicker would take the message along.

    Args:
        code: Exit code.
        asked: What `note_termination` gave, so that it need not be waited for longer than the launcher does.
    """
    until = time.monotonic() + PATIENCE_S
    while not asked and time.monotonic() < until:
        time.sleep(0.05)
    sys.exit(code)
