"""The text that ships with CPython: its manual's chapters on the language, of `pydoc_data.topics`.

Nothing is downloaded. The text is that of the running Python, so that figures of two versions differ.
"""

import sys
from dataclasses import dataclass
from typing import Any

from data.causal_text import CausalText, Loaded, Sizes
from data.corpus import Corpus, Document, stream_of
from utils.rules import Count, Seed, checked

EVERY = 8


@checked
def pydoc(
    *,
    length: Count = 128,
    batch_size: Count = 16,
    calibration_samples: Count = 128,
    calibration_length: Count = 128,
    calibration_batch_size: Count = 16,
    train_samples: Count | None = None,
    validation_samples: Count | None = None,
    tokens: Count | None = None,
    calibration: Any = None,
    seed: Seed = 0,
) -> "Pydoc":
    """Python's own manual; every eighth chapter is for validation.

    Args:
        length: Tokens of a training or validation chunk.
        batch_size: Chunks per batch.
        calibration_samples: Windows that scores are computed on.
        calibration_length: Tokens of each, whatever `length` is.
        calibration_batch_size: Windows per batch.
        train_samples: Chunks to train on at most; None: all.
        validation_samples: Chunks to validate on at most; None: all.
        tokens: Length of the sample that costs are stated for; None: that of a calibration window.
        calibration: Another source of text to calibrate on, with sizes of its own; None: this one.
        seed: Seeds the order of training and the calibration windows.

    Raises:
        InputError: If a value breaks its rule.
    """
    sizes = Sizes(
        length, batch_size, calibration_samples, calibration_length, calibration_batch_size, train_samples,
        validation_samples, tokens, seed,
    )  # fmt: skip
    return Pydoc(name="pydoc", sizes=sizes, calibration=calibration)


@dataclass(frozen=True, kw_only=True)
class Pydoc(CausalText):
    """Python's manual, which waits for a tokenizer."""

    def load(self, tokenizer: Any) -> Loaded:
        """Every chapter tokenised by itself; windows are of the stream of chapters for training."""
        texts, held_out = chapters()
        train, name = stream_of(tokenizer, texts), f"pydoc-{sys.version_info[0]}.{sys.version_info[1]}-validation"
        corpus = Corpus(
            name=name,
            tokens=stream_of(tokenizer, held_out),
            documents=[Document(text, text) for text in held_out],
            tokenizer=tokenizer,
            document_protocol=f"{name}/documents",
            most_chunks=self.sizes.validation_samples,
        )
        return Loaded(train, self.stream_windows(train), corpus)


def chapters() -> tuple[list[str], list[str]]:
    """The manual's chapters, for training and for validation, by the alphabet."""
    from pydoc_data.topics import topics

    ordered = [topics[name].strip() for name in sorted(topics)]
    return [text for n, text in enumerate(ordered, 1) if n % EVERY], ordered[EVERY - 1 :: EVERY]
