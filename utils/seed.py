"""Random state: set it, and give it back as it was; and the same bits again on a GPU."""

import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# cuBLAS adds in one order only with a workspace of fixed size; read when it is first used
WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Leave every generator after the block as it was before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def deterministic(asked: bool) -> Iterator[list[str]]:
    """Let torch choose the algorithms that give the same bits again, and give its settings back afterwards.

    Args:
        asked: Whether to; else nothing is changed.

    Yields:
        Grows by the names of operations that ran although they have no such algorithm.
    """
    found: list[str] = []
    if not asked:
        yield found
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    if not torch.cuda.is_initialized():
        os.environ.setdefault(WORKSPACE, FIXED)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with _noted(found):
            yield found
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def _noted(found: list[str]) -> Iterator[None]:
    """Write down what torch warns of, in the place of showing it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=r".*deterministic implementation.*")
        shown = warnings.showwarning

        def note(message: Any, *where: Any, **more: Any) -> None:
            match = REFUSED.search(str(message))
            if match is None:
                shown(message, *where, **more)
            elif match[1] not in found:
                found.append(match[1])

        warnings.showwarning = note
        yield


def determinism(asked: bool, device: str, undetermined: list[str]) -> dict[str, Any]:
    """What a record says of whether the same command gives the same bits again on the same machine.

    Args:
        asked: The key `deterministic`.
        device: Type of the device.
        undetermined: Operations without a deterministic algorithm that ran all the same.
    """
    never = [
        "times, energy and peak memory are measured anew",
        "another machine or another number of threads may add in another order",
    ]
    if device == "cuda" and not asked:
        never.append("deterministic=false: sums on the GPU may differ in their last bits")
    if device == "cuda" and asked and os.environ.get(WORKSPACE) not in (FIXED, ":16:8"):
        never.append(f"{WORKSPACE}={os.environ.get(WORKSPACE)}: cuBLAS may add in another order; must be {FIXED}")
    never += [f"{name} has no deterministic algorithm here" for name in undetermined]
    return {"asked": asked, "operations": list(undetermined), "not_deterministic": never}
