"""Likelihoods of whole documents, as the task wikitext of EleutherAI's evaluation harness counts them.

A document's tokens, special ones left out, are predicted in windows that do not overlap, of at most L tokens. The
first window follows a prefix token (the tokenizer's beginning of sequence, else its end); each later one follows
the last token of its predecessor, and the last window of all as many tokens before it as fit into L. Word and byte
counts are those of the raw documents, and sums run over all documents before they are divided.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from data.base import DataBundle
from data.corpus import Corpus, token_hash
from data.language_modelling import IGNORED, exponential
from evals.base import Measurement, Measurements, Subject
from evals.numerics import numerics
from evals.perplexity import readable
from models.base import Batch, PrunableModel
from utils.errors import InputError
from utils.rules import Count, check_fields

Window = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Likelihood:
    """Sums over all documents.

    Attributes:
        nats: Negative log-likelihood.
        words: Pieces between runs of white space, empty ones at the ends included.
        size: Bytes of UTF-8.
        details: What the figure depends on.
    """

    nats: float
    words: int
    size: int
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DocumentPerplexity(ABC):
    """`exp(nats of all documents / size of all documents)`; a subclass says what their size is.

    Attributes:
        max_length: Tokens that a window predicts at most; part of the protocol.
        batch: Windows in a forward pass; no part of the result.
    """

    max_length: Count = 2048
    batch: Count = 4

    name: ClassVar[str]
    unit: ClassVar[str]
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def per(self, found: Likelihood) -> int:
        """The size of all documents."""

    @abstractmethod
    def more(self, found: Likelihood) -> dict[str, Any]:
        """Figures that belong to it, by name."""

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse data without documents, windows beyond the model's context, and a tokenizer without a first token.

        Raises:
            InputError: If that is so.
        """
        corpus = readable(model, data, self.max_length, f"evals.{self.name}.max_length")
        if prefix_of(corpus.tokenizer) is None:
            rule = "must have a token for the beginning or the end of a text, which documents start with"
            raise InputError(f"evals.{self.name}: the tokenizer of model={model.name} {rule}")
        if not any(corpus.document_tokens):
            raise InputError(f"evals.{self.name}: the documents of {corpus.name} hold no tokens")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model on the same documents."""
        return [{self.name: self._perplexity(subject)} for subject in subjects]

    def _perplexity(self, subject: Subject) -> Measurement:
        try:
            self.check(subject.model, subject.data)
        except InputError as error:
            return Measurement(None, self.unit, str(error))
        found = likelihood(subject, self.max_length, self.batch)
        details = {**found.details, **self.more(found)}
        return Measurement(exponential(found.nats / self.per(found)), self.unit, details=details)


def likelihood(subject: Subject, max_length: int, batch: int) -> Likelihood:
    """Measure a model on the documents of its data.

    Args:
        subject: The model with its data.
        max_length: Tokens that a window predicts at most, L.
        batch: Windows in a forward pass; no part of the result.
    """
    corpus: Corpus = subject.data.task.corpus  # type: ignore[attr-defined]
    prefix, read = prefix_of(corpus.tokenizer), corpus.document_tokens
    assert prefix is not None
    windows = [window for tokens in read for window in rolling_windows(tokens, prefix, max_length)]
    # which goes first does not matter to a sum, and windows of like length need little padding
    windows.sort(key=lambda window: -len(window[0]))
    batches = [padded(windows[first : first + batch]) for first in range(0, len(windows), batch)]
    identity = token_hash(torch.tensor([token for read, wanted in windows for token in (len(read), *read, *wanted)]))
    nats = sum(float(costs[..., 0].double().sum()) for costs, _ in subject.answers(batches, f"{identity}/{batch}"))
    raw = [document.raw for document in corpus.documents]
    predicted = sum(map(len, read))
    details = {
        "protocol": f"{corpus.document_protocol}@{max_length}",
        "max_length": max_length,
        "documents": len(raw),
        "windows": len(windows),
        "predicted": predicted,
        "token_hash": identity,
        "token_perplexity": exponential(nats / predicted),
        "prefix": corpus.tokenizer.convert_ids_to_tokens(prefix),
        "add_bos_token": False,
        "batch_size": batch,
        **corpus.facts,
        **numerics(subject.model),
    }
    return Likelihood(nats, sum(map(words_in, raw)), sum(len(t.encode()) for t in raw), details)


def prefix_of(tokenizer: Any) -> int | None:
    """The token before a document: the tokenizer's beginning of sequence, else its end; None if it has neither."""
    return next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)


def rolling_windows(tokens: Sequence[int], prefix: int, most: int) -> Iterator[Window]:
    """Cut a document into windows, each with its context.

    Args:
        tokens: What is to be predicted.
        prefix: The token before the first.
        most: Tokens of a window, L.

    Yields:
        What a window reads, and for each token that it reads what follows it; -100 where that is context of the
        last window that an earlier one has predicted. Every token is predicted once.
    """
    whole = [prefix, *tokens]
    for first in range(0, len(tokens), most):
        end = min(first + most, len(tokens))
        start = max(0, end - most) if first else 0
        yield whole[start:end], [IGNORED] * (first - start) + list(tokens[first:end])


def padded(windows: Sequence[Window]) -> Batch:
    """Windows as one batch of the longest of them, (B, T)."""
    longest = max(len(read) for read, _ in windows)

    def table(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])

    return {
        "input_ids": table([read for read, _ in windows], 0),
        "attention_mask": table([[1] * len(read) for read, _ in windows], 0),
        "targets": table([wanted for _, wanted in windows], IGNORED),
    }


def words_in(text: str) -> int:
    """Pieces between runs of white space, empty ones at the ends included."""
    return len(re.split(r"\s+", text))
