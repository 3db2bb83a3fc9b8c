"""Size of the saved model: bytes of its safetensors file, as it is and compressed."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save

from evals.base import Measurement, Measurements, Subject
from models.checkpoint import METADATA, tensors_of
from utils.progress import progress_bar
from utils.rules import check_fields

LEVEL, CHUNK = 1, 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of the very file that `save=true` writes.

    Attributes:
        compress: Also count the same bytes compressed by zlib: about two seconds for 100 MB.
    """

    compress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Serialise each model and count."""
        return [{"size": self._size(subject)} for subject in subjects]

    def _size(self, subject: Subject) -> Measurement:
        content = save(tensors_of(subject.model), METADATA)
        details: dict[str, Any] = {}
        if self.compress:
            details = {"compressed": compressed_bytes(content), "codec": f"zlib level {LEVEL}, chunks of 4 MiB"}
        return Measurement(len(content), "byte", details=details)


def compressed_bytes(content: bytes) -> int:
    """Bytes that zlib makes of the content, chunk by chunk on all cores."""
    starts = range(0, len(content), CHUNK)
    total = 0
    with progress_bar("compressed size", len(starts)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        # zlib lets other threads run
        for size in pool.map(lambda start: len(zlib.compress(content[start : start + CHUNK], LEVEL)), starts):
            total += size
            advance("")
    return total
