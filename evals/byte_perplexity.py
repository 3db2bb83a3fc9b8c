"""Perplexity per byte of raw text, over whole documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evals.base import Measurement, Measurements, Subject
from evals.documents import as_measurement, likelihood
from utils.rules import Count, check_fields

UNIT = "per byte"


@dataclass(frozen=True, kw_only=True)
class BytePerplexity:
    """`exp(nats of all documents / bytes of all documents)`; see `evals/documents.py`.

    Attributes:
        max_length: Tokens that a window predicts at most; part of the protocol.
        batch: Windows in a forward pass; no part of the result.
    """

    max_length: Count = 2048
    batch: Count = 4

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model on the same documents."""
        return [{"byte_perplexity": self._perplexity(subject)} for subject in subjects]

    def _perplexity(self, subject: Subject) -> Measurement:
        found = likelihood(subject, self.max_length, self.batch, "byte_perplexity")
        if isinstance(found, str):
            return Measurement(None, UNIT, found)
        return as_measurement(
            found, UNIT, found.size, {"bytes": found.size, "bits_per_byte": found.nats / found.size / math.log(2)}
        )
