"""Perplexity per word of raw text, over whole documents."""

from collections.abc import Sequence
from dataclasses import dataclass

from evals.base import Measurement, Measurements, Subject
from evals.documents import as_measurement, likelihood
from utils.rules import Count, check_fields

UNIT = "per word"


@dataclass(frozen=True, kw_only=True)
class WordPerplexity:
    """`exp(nats of all documents / words of all documents)`; see `evals/documents.py`.

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
        return [{"word_perplexity": self._perplexity(subject)} for subject in subjects]

    def _perplexity(self, subject: Subject) -> Measurement:
        found = likelihood(subject, self.max_length, self.batch, "word_perplexity")
        if isinstance(found, str):
            return Measurement(None, UNIT, found)
        return as_measurement(found, UNIT, found.words, {"words": found.words})
