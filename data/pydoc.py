"""The text that ships with CPython: its manual's chapters on the language, of `pydoc_data.topics`.

Nothing is downloaded. The text is that of the running Python, so that figures of two versions differ.
"""

import sys
from dataclasses import dataclass
from typing import Any

from data.base import fingerprint_of
from data.causal_text import CausalText, Loaded
from data.corpus import Document, stream_of
from data.token_cache import TokenCache
from utils.rules import Count

EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Pydoc(CausalText):
    """Python's own manual; every eighth chapter is for validation."""

    length: Count = 128
    batch_size: Count = 16
    calibration_length: Count = 128
    calibration_batch_size: Count = 16

    @property
    def name(self) -> str:
        """The module that holds the text."""
        return "pydoc"

    def identity(self) -> str:
        """Hash of all chapters."""
        train, held_out = chapters()
        return fingerprint_of(len(train), *train, *held_out)

    def load(self, tokenizer: Any, cache: TokenCache) -> Loaded:
        """Every chapter tokenised by itself; windows are of the stream of chapters for training."""
        texts, held_out = chapters()
        name = f"pydoc-{sys.version_info[0]}.{sys.version_info[1]}-validation"
        train = cache.part("train", lambda: stream_of(tokenizer, texts))
        return Loaded(
            name=name,
            train=train,
            windows=self.stream_windows(train),
            measured=cache.part("measured", lambda: stream_of(tokenizer, held_out)),
            documents=lambda: [Document(text, text) for text in held_out],
            document_protocol=f"{name}/documents",
        )


pydoc = Pydoc


def chapters() -> tuple[list[str], list[str]]:
    """The manual's chapters, for training and for validation, by the alphabet."""
    from pydoc_data.topics import topics

    ordered = [topics[name].strip() for name in sorted(topics)]
    return [text for n, text in enumerate(ordered, 1) if n % EVERY], ordered[EVERY - 1 :: EVERY]
