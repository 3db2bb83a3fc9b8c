"""What all data for causal language models share: chunks to train and validate on, windows to calibrate on."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.base import Batch, DataBundle, TensorBatches, fingerprint_of
from data.corpus import Corpus, chunked
from data.language_modelling import LanguageModelling
from data.text import tokenizer_identity
from data.windows import stream_windows
from models.preprocessing import TextPreprocessing
from utils.errors import InputError

if TYPE_CHECKING:
    from models.base import PrunableModel


@dataclass(frozen=True)
class Sizes:
    """How much text, in what pieces.

    Attributes:
        length: Tokens of a training or validation chunk.
        batch_size: Chunks per batch.
        calibration_samples: Windows that scores are computed on.
        calibration_length: Tokens of each, whatever `length` is.
        calibration_batch_size: Windows per batch.
        train_samples: Chunks to train on at most; None: all.
        validation_samples: Chunks to validate on at most; None: all.
        tokens: Length of the sample that costs are stated for; None: that of a calibration window.
        seed: Seeds the order of training and the calibration windows.
    """

    length: int
    batch_size: int
    calibration_samples: int
    calibration_length: int
    calibration_batch_size: int
    train_samples: int | None
    validation_samples: int | None
    tokens: int | None
    seed: int


@dataclass(frozen=True)
class Loaded:
    """What a source holds, for one tokenizer.

    Attributes:
        train: The training text as one stream, as much of it as training takes, (T,) int64.
        windows: Draws calibration windows, (calibration samples, calibration length) int64; not asked where
            another source gives them.
        corpus: The text to measure on.
    """

    train: Tensor
    windows: Callable[[], Tensor]
    corpus: Corpus


@dataclass(frozen=True, kw_only=True)
class CausalText(ABC):
    """A source of text that waits for a model's tokenizer.

    Attributes:
        name: Short name for folders and reports.
        sizes: See `Sizes`.
        calibration: Where calibration windows come from, with sizes of its own; None: its own training text.
    """

    name: str
    sizes: Sizes
    calibration: "CausalText | None" = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, CausalText | None):
            raise InputError(f"data.calibration={self.calibration!r}: must be null or another source of text")

    @abstractmethod
    def load(self, tokenizer: Any) -> Loaded:
        """Read and tokenise the texts, each once."""

    def stream_windows(self, stream: Tensor) -> Callable[[], Tensor]:
        """Draws calibration windows of a stream (T,): (calibration samples, calibration length)."""
        sizes = self.sizes
        return partial(
            stream_windows, stream, sizes.calibration_samples, sizes.calibration_length, sizes.seed, self.name
        )

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Read the texts for this model's tokenizer.

        Raises:
            InputError: If the model has no tokenizer, takes fewer tokens than asked for, or a text is too short.
        """
        own, sizes, source = self._preprocessing(model), self.sizes, self.calibration or self
        loaded = self.load(own.tokenizer)
        windows = (loaded if source is self else source.load(own.tokenizer)).windows()
        corpus, stream = loaded.corpus, loaded.train
        validation = self._demanded(corpus.chunks(sizes.length), len(corpus.tokens), corpus.name)
        train = self._demanded(chunked(stream, sizes.length)[: sizes.train_samples], len(stream), "the training text")
        identity = tokenizer_identity(own.tokenizer)
        return DataBundle(
            name=self.name,
            domain="language",
            task=LanguageModelling(
                vocabulary=max(own.tokenizer.get_vocab().values()) + 1,
                protocol=f"{corpus.name}/token-chunk@{sizes.length}",
                corpus=corpus,
            ),
            calibration=[as_batch(rows) for rows in windows.split(source.sizes.calibration_batch_size)],
            train=TensorBatches(as_batch(train), sizes.batch_size, shuffle_seed=sizes.seed),
            train_samples=len(train),
            validation=TensorBatches(as_batch(validation), sizes.batch_size),
            example=as_batch(_stretched(windows.flatten(), self.example_length)[None]),
            fingerprints={
                "train": fingerprint_of(train, sizes.batch_size, sizes.seed, identity),
                "calibration": fingerprint_of(windows, source.sizes.calibration_batch_size, identity),
                "validation": fingerprint_of(validation, sizes.batch_size, identity),
            },
            notes=[self._calibrated_on(source, corpus), *self.notes],
        )

    @property
    def example_length(self) -> int:
        """Length of the sample that costs are stated for, in tokens."""
        return self.sizes.tokens or (self.calibration or self).sizes.calibration_length

    def _calibrated_on(self, source: "CausalText", corpus: Corpus) -> str:
        drawn = f"{source.sizes.calibration_samples} windows of {source.sizes.calibration_length} tokens"
        kind = "in-domain" if source is self else "another domain"
        return f"Calibrated on {drawn} of {source.name}, measured on {corpus.name} ({kind})."

    def _preprocessing(self, model: "PrunableModel") -> TextPreprocessing:
        found, inner = model.preprocessing, self.calibration or self
        if not isinstance(found, TextPreprocessing):
            raise InputError(f"data={self.name} needs a model with a tokenizer; model={model.name} has none")
        at = "data.calibration." if self.calibration else "data."
        asked = {"data.length": self.sizes.length, f"{at}calibration_length": inner.sizes.calibration_length}
        for key, value in {**asked, "data.tokens": self.example_length}.items():
            if value > found.longest:
                raise InputError(f"{key}={value}: must be at most {found.longest}, the context of model={model.name}")
        return found

    def _demanded(self, chunks: Tensor, tokens: int, what: str) -> Tensor:
        if len(chunks):
            return chunks
        raise InputError(f"data.length={self.sizes.length}: must be at most {tokens}, all tokens that {what} has")


def _stretched(tokens: Tensor, length: int) -> Tensor:
    """The first `length` tokens of as many copies as that takes."""
    return tokens.repeat(-(-length // len(tokens)))[:length]


def as_batch(tokens: Tensor) -> Batch:
    """Token ids (B, T) as a batch without padding."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
