"""Perplexity per word of raw text, over whole documents."""

from dataclasses import dataclass
from typing import Any, ClassVar

from evals.documents import DocumentPerplexity, Likelihood


@dataclass(frozen=True, kw_only=True)
class WordPerplexity(DocumentPerplexity):
    """`exp(nats of all documents / words of all documents)`; see `evals/documents.py`."""

    name: ClassVar[str] = "word_perplexity"
    unit: ClassVar[str] = "per word"

    def per(self, found: Likelihood) -> int:
        """Words of all documents."""
        return found.words

    def more(self, found: Likelihood) -> dict[str, Any]:
        """How many words there are."""
        return {"words": found.words}
