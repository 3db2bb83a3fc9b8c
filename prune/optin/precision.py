"""What the candidates' passes are computed in; losses are always taken in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def computed_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a block's matrix products in a precision; the residual stream keeps the weights' type.

    Args:
        precision: `tf32` acts on CUDA alone, and is float32 elsewhere.
        device: Where the block computes.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Run a block as written, also inside `computed_in`."""
    with torch.autocast(device.type, enabled=False):
        yield
