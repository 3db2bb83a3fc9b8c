"""Perplexity per byte of raw text, over whole documents."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from evals.documents import DocumentPerplexity, Likelihood


@dataclass(frozen=True, kw_only=True)
class BytePerplexity(DocumentPerplexity):
    """`exp(nats of all documents / bytes of all documents)`; see `evals/documents.py`."""

    name: ClassVar[str] = "byte_perplexity"
    unit: ClassVar[str] = "per byte"

    def per(self, found: Likelihood) -> int:
        """Bytes of all documents."""
        return found.size

    def more(self, found: Likelihood) -> dict[str, Any]:
        """How many bytes there are, and the same cost in bits."""
        return {"bytes": found.size, "bits_per_byte": found.nats / found.size / math.log(2)}
