"""Likelihoods of whole documents, as the task wikitext of EleutherAI's evaluation harness counts them.

A document's tokens, special ones left out, are predicted in windows that do not overlap, of at most L tokens. The
first window follows a prefix token (the tokenizer's beginning of sequence, else its end); each later one follows
the last token of its predecessor, and the last window of all as many tokens before it as fit into L. Word and byte
counts are those of the raw documents, and sums run over all documents before they are divided.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.corpus import Corpus, token_hash
from data.language_modelling import IGNORED, exponential
from evals.base import Measurement, Subject
from evals.perplexity import numerics, unmeasurable
from models.base import Batch

Window = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Likelihood:
    """Sums over all documents.

    Attributes:
        nats: Negative log-likelihood.
        tokens: Predicted tokens.
        words: Pieces between runs of white space, empty ones at the ends included.
        size: Bytes of UTF-8.
        details: What the figure depends on.
    """

    nats: float
    tokens: int
    words: int
    size: int
    details: dict[str, Any]


def likelihood(subject: Subject, max_length: int, batch: int, metric: str) -> Likelihood | str:
    """Measure a model on the documents of its data, or say why that can't be done.

    Args:
        subject: The model with its data.
        max_length: Tokens that a window predicts at most, L.
        batch: Windows in a forward pass; no part of the result.
        metric: Name of the metric, for messages.
    """
    if reason := unmeasurable(subject, max_length, f"evals.{metric}.max_length"):
        return reason
    corpus: Corpus = subject.data.task.corpus  # type: ignore[attr-defined]
    prefix = next((t for t in (corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id) if t is not None), None)
    if prefix is None:
        return "the tokenizer has no token that a document could start with"
    texts = [document.text for document in corpus.documents]
    read = corpus.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [window for tokens in read for window in rolling_windows(tokens, prefix, max_length)]
    # which goes first does not matter to a sum, and windows of like length need little padding
    windows.sort(key=lambda window: -len(window[0]))
    batches = [padded(windows[first : first + batch]) for first in range(0, len(windows), batch)]
    if not windows:
        return f"the documents of {corpus.name} hold no tokens"
    identity = token_hash(torch.tensor([token for read, wanted in windows for token in (len(read), *read, *wanted)]))
    nats = sum(float(costs[..., 0].double().sum()) for costs, _ in subject.answers(batches, f"{identity}/{batch}"))
    raw = [document.raw for document in corpus.documents]
    predicted = sum(map(len, read))
    details = {
        "protocol": f"{corpus.document_protocol}@{max_length}",
        "max_length": max_length,
        "documents": len(raw),
        "predicted": predicted,
        "token_perplexity": exponential(nats / max(1, predicted)),
        "prefix": corpus.tokenizer.convert_ids_to_tokens(prefix),
        "add_bos_token": False,
        **numerics(subject),
    }
    return Likelihood(nats, predicted, sum(map(words_in, raw)), sum(len(t.encode()) for t in raw), details)


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


def as_measurement(found: Likelihood, unit: str, per: int, details: dict[str, Any]) -> Measurement:
    """`exp(nats / per)` with its details."""
    return Measurement(exponential(found.nats / per), unit, details={**found.details, **details})
