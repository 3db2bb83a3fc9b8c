"""Jobs of a sweep end with the process that started it, also where that was killed and could tell them nothing."""

import json
import os
import threading
import time

from utils.locks import Owner, owner_of

VARIABLE = "PARE_SWEEP_STARTER"
WATCH = "sweep-starter"
LOOK_S = 1.0
TERMINATED = 143


def starter() -> dict[str, str]:
    """What the environment of jobs says of this process, which starts them."""
    return {VARIABLE: json.dumps(vars(Owner.this()))}


def end_with_starter() -> None:
    """From now on end this process at once if the one that started its sweep is gone.

    Nothing is left half written by that, and what is finished lies in storage. Nothing is done where no starter is
    named, where this is it, or where it runs on another machine.
    """
    owner = owner_of(os.environ.get(VARIABLE, "").encode())
    if owner is None or owner.pid == os.getpid() or any(t.name == WATCH for t in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(owner,), name=WATCH, daemon=True).start()


def _watch(owner: Owner) -> None:
    while not owner.is_dead():
        time.sleep(LOOK_S)
    os._exit(TERMINATED)
