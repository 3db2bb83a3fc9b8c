"""One file an architecture family: how to build it, and where its units live. Names no method."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(folder: str | Path) -> "nn.Module":
    """Build a model that `save=true` wrote, as a plain module ready to run.

    Raises:
        InputError: If the folder is missing or damaged.
    """
    # torch is imported only now: looking up a model's name must not cost a second
    from models.checkpoint import load_network

    return load_network(folder)
