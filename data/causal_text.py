"""What all data for causal language models share: chunks to train and validate on, windows to calibrate on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import data.corpus
import data.documents
import data.tables
import data.wikitext_pages
import data.windows
from data.base import Batch, DataBundle, TensorBatches, fingerprint_of
from data.corpus import Corpus, Document, LazyDocuments, chunked, token_hash
from data.language_modelling import LanguageModelling
from data.text import tokenizer_identity
from data.token_cache import TokenCache
from data.windows import stream_windows
from models.preprocessing import TextPreprocessing
from utils.code import code_hash
from utils.errors import InputError
from utils.rules import Count, Seed, check_fields
from utils.storage import Store, folder_name

if TYPE_CHECKING:
    from models.base import PrunableModel

# what lies between a file and its token ids
CODE = (data.corpus, data.documents, data.tables, data.wikitext_pages, data.windows)


@dataclass(frozen=True)
class Loaded:
    """What a source holds, for one tokenizer; each part is read and tokenised when it is asked for.

    Attributes:
        name: What the text to measure on is called, such as `wikitext2-test`.
        train: The training text as one stream, as much of it as training takes, (T,) int64.
        windows: Calibration windows, (calibration samples, calibration length) int64; given what the key of their
            length is called, for messages.
        measured: The text to measure on as one stream, (T,) int64.
        documents: The same text, document by document.
        document_protocol: Name of how likelihoods of documents are counted.
    """

    name: str
    train: Callable[[], Tensor]
    windows: Callable[[str], Tensor]
    measured: Callable[[], Tensor]
    documents: Callable[[], Sequence[Document]]
    document_protocol: str


@dataclass(frozen=True, kw_only=True)
class CausalText(ABC):
    """A source of text that waits for a model's tokenizer; a subclass says where the text lies.

    Attributes:
        length: Tokens of a training or validation chunk.
        batch_size: Chunks per batch.
        calibration_samples: Windows that scores are computed on.
        calibration_length: Tokens of each, whatever `length` is.
        calibration_batch_size: Windows per batch.
        train_samples: Chunks to train on at most; None: all.
        validation_samples: Chunks to validate on at most; None: all.
        tokens: Length of the sample that costs are stated for; None: that of a calibration window.
        calibration: Another source of text to calibrate on, with sizes of its own; None: this one.
        calibration_seed: Seeds the calibration windows alone, wherever they come from; None: `seed` of their source.
        seed: Seeds the order of training and the calibration windows.
    """

    length: Count = 2048
    batch_size: Count = 4
    calibration_samples: Count = 128
    calibration_length: Count = 2048
    calibration_batch_size: Count = 4
    train_samples: Count | None = None
    validation_samples: Count | None = None
    tokens: Count | None = None
    calibration: Any = None
    calibration_seed: Seed | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.calibration, CausalText | None):
            raise InputError(f"data.calibration={self.calibration!r}: must be null or another source of text")

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for folders and reports."""

    @property
    def settings(self) -> dict[str, Any]:
        """What token ids depend on beside the text and the sizes above, as plain values."""
        return {}

    @abstractmethod
    def identity(self) -> str:
        """Hash of all text that the source reads."""

    @abstractmethod
    def load(self, tokenizer: Any, cache: TokenCache) -> Loaded:
        """Say how each part is read and tokenised.

        Args:
            tokenizer: Makes token ids of texts.
            cache: Keeps those of the streams.
        """

    def stream_windows(self, stream: Callable[[], Tensor]) -> Callable[[str], Tensor]:
        """Calibration windows of a stream (T,), for `Loaded.windows`."""
        return lambda key: stream_windows(stream(), *self.drawn, key)

    @property
    def drawn(self) -> tuple[int, int, int, str]:
        """Number, length and seed of the calibration windows, and what they are drawn from."""
        seed = self.seed if self.calibration_seed is None else self.calibration_seed
        return self.calibration_samples, self.calibration_length, seed, self.name

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Read the texts for this model's tokenizer; nothing is kept."""
        return self.prepare_in(model, None)

    def prepare_in(self, model: "PrunableModel", store: Store | None) -> DataBundle:
        """Read the texts for this model's tokenizer; token ids that lie in storage are not made again.

        Raises:
            InputError: If the model has no tokenizer, takes fewer tokens than asked for, or a text is too short.
        """
        own, source = self._preprocessing(model), self._calibrated
        loaded, cache = opened = self._opened(own.tokenizer, store)
        stream, corpus = loaded.train(), self._corpus(loaded, own.tokenizer, cache)
        windows = source._windows(*(opened if source is self else source._opened(own.tokenizer, store)), self._at)
        validation = self._demanded(corpus.chunks(self.length), len(corpus.tokens), corpus.name)
        train = self._demanded(chunked(stream, self.length)[: self.train_samples], len(stream), "the training text")
        identity = tokenizer_identity(own.tokenizer)
        return DataBundle(
            name=self.name,
            domain="language",
            task=LanguageModelling(
                vocabulary=max(own.tokenizer.get_vocab().values()) + 1,
                protocol=f"{corpus.name}/token-chunk@{self.length}",
                corpus=corpus,
                token_hash=token_hash(validation),
            ),
            calibration=[as_batch(rows) for rows in windows.split(source.calibration_batch_size)],
            train=TensorBatches(as_batch(train), self.batch_size, shuffle_seed=self.seed),
            train_samples=len(train),
            validation=TensorBatches(as_batch(validation), self.batch_size),
            example=as_batch(_stretched(windows.flatten(), self.example_length)[None]),
            fingerprints={
                "train": fingerprint_of(train, self.batch_size, self.seed, identity),
                "calibration": fingerprint_of(windows, source.calibration_batch_size, identity),
                "validation": fingerprint_of(validation, self.batch_size, identity),
            },
            notes=[self._calibrated_on(source, corpus)],
        )

    @property
    def example_length(self) -> int:
        """Length of the sample that costs are stated for, in tokens."""
        return self.tokens or self._calibrated.calibration_length

    @property
    def _calibrated(self) -> "CausalText":
        """Where calibration windows come from."""
        if self.calibration is None or self.calibration_seed is None:
            return self.calibration or self
        return replace(self.calibration, calibration_seed=self.calibration_seed)

    @property
    def _at(self) -> str:
        """Where the keys of the calibration windows stand."""
        return "data.calibration." if self.calibration else "data."

    def _opened(self, tokenizer: Any, store: Store | None) -> tuple[Loaded, TokenCache]:
        key = {
            "source": type(self).__name__,
            "text": self.identity(),
            "tokenizer": tokenizer_identity(tokenizer),
            "settings": self.settings,
            "code": code_hash(type(self), *CODE),
        }
        cache = TokenCache(store, f"language/{folder_name(self.name)}/tokens", key)
        return self.load(tokenizer, cache), cache

    def _windows(self, loaded: Loaded, cache: TokenCache, at: str) -> Tensor:
        samples, length, seed, _ = self.drawn
        draw = partial(loaded.windows, f"{at}calibration_length")
        return cache.part("windows", draw, samples=samples, length=length, seed=seed)()

    def _corpus(self, loaded: Loaded, tokenizer: Any, cache: TokenCache) -> Corpus:
        return Corpus(
            name=loaded.name,
            tokens=loaded.measured(),
            documents=LazyDocuments(loaded.documents),
            tokenizer=tokenizer,
            document_protocol=loaded.document_protocol,
            most_chunks=self.validation_samples,
            facts={"text": cache.key["text"], "tokenizer": cache.key["tokenizer"], "seed": self.seed},
            cache=cache,
        )

    def _calibrated_on(self, source: "CausalText", corpus: Corpus) -> str:
        drawn = f"{source.calibration_samples} windows of {source.calibration_length} tokens"
        kind = "in-domain" if source is self else "another domain"
        return f"Calibrated on {drawn} of {source.name}, measured on {corpus.name} ({kind})."

    def _preprocessing(self, model: "PrunableModel") -> TextPreprocessing:
        found, inner = model.preprocessing, self._calibrated
        if not isinstance(found, TextPreprocessing):
            raise InputError(f"data={self.name} needs a model with a tokenizer; model={model.name} has none")
        asked = {"data.length": self.length, f"{self._at}calibration_length": inner.calibration_length}
        for key, value in {**asked, "data.tokens": self.example_length}.items():
            if value > found.longest:
                raise InputError(f"{key}={value}: must be at most {found.longest}, the context of model={model.name}")
        return found

    def _demanded(self, chunks: Tensor, tokens: int, what: str) -> Tensor:
        if len(chunks):
            return chunks
        raise InputError(f"data.length={self.length}: must be at most {tokens}, all tokens that {what} has")


def _stretched(tokens: Tensor, length: int) -> Tensor:
    """The first `length` tokens of as many copies as that takes."""
    return tokens.repeat(-(-length // len(tokens)))[:length]


def as_batch(tokens: Tensor) -> Batch:
    """Token ids (B, T) as a batch without padding."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
