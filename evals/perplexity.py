"""Perplexity per token by the token-chunk protocol, `<text>/token-chunk@L`.

The text is tokenised once and cut into chunks of exactly L tokens, without overlap; the tail is dropped. The
first token of a chunk is context only. With `m_c` the mean over the L - 1 others of `-log p(token | chunk so far)`,
the perplexity of n chunks is `exp(sum_c m_c / n)`. Figures of different L, or of another protocol, don't compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.base import DataBundle, TensorBatches
from data.corpus import Corpus, token_hash
from data.language_modelling import IGNORED, LanguageModelling, exponential, next_tokens
from evals.base import Measurement, Measurements, Subject
from evals.numerics import numerics
from models.base import PrunableModel
from utils.errors import InputError
from utils.rules import Count, check_fields

UNIT = "per token"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of the data's validation text.

    Attributes:
        length: Tokens of a chunk, L; part of the protocol's name.
        batch: Chunks in a forward pass; no part of the result.
    """

    length: Count = 2048
    batch: Count = 4

    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse data without text, chunks beyond the model's context, and chunks that the text does not fill.

        Raises:
            InputError: If that is so.
        """
        key = "evals.perplexity.length"
        corpus = readable(model, data, self.length, key)
        if not 2 <= self.length <= len(corpus.tokens):
            rule = f"must be from 2 to {len(corpus.tokens)}, all tokens that {corpus.name} has"
            raise InputError(f"{key}={self.length}: {rule}")

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model on the same chunks."""
        return [{"perplexity": self._perplexity(subject)} for subject in subjects]

    def _perplexity(self, subject: Subject) -> Measurement:
        try:
            self.check(subject.model, subject.data)
        except InputError as error:
            return Measurement(None, UNIT, str(error))
        corpus: Corpus = subject.data.task.corpus  # type: ignore[attr-defined]
        chunks = corpus.chunks(self.length)
        samples = {"input_ids": chunks, "attention_mask": torch.ones_like(chunks)}
        digest = token_hash(chunks)
        answers = subject.answers(TensorBatches(samples, self.batch), f"{digest}@{self.length}/{self.batch}")
        means = torch.cat([chunk_means(costs, next_tokens(batch)) for costs, batch in answers])
        details = {
            "protocol": f"{corpus.name}/token-chunk@{self.length}",
            "length": self.length,
            "chunks": len(chunks),
            "predicted": len(chunks) * (self.length - 1),
            "token_hash": digest,
            "bos": corpus.bos(chunks),
            "batch_size": self.batch,
            **corpus.facts,
            **numerics(subject.model),
        }
        return Measurement(exponential(float(means.mean())), UNIT, details=details)


def chunk_means(costs: Tensor, wanted: Tensor) -> Tensor:
    """Mean cost of each chunk's predicted tokens.

    Args:
        costs: What `LanguageModelling.condensed` gives, (B, T, 2).
        wanted: Predicted tokens, (B, T); -100 where there is none.

    Returns:
        Nats per token, (B,) in float64.
    """
    return costs[..., 0].double().sum(dim=1) / (wanted != IGNORED).sum(dim=1)


def readable(model: PrunableModel, data: DataBundle, length: int, key: str) -> Corpus:
    """The text that a perplexity is measured on, in windows that fit into the model's context.

    Args:
        model: What reads it.
        data: Where it lies.
        length: Tokens of a window.
        key: What that is called, for messages.

    Raises:
        InputError: If there is none, or the windows don't fit.
    """
    task, own = data.task, model.preprocessing
    if not isinstance(task, LanguageModelling) or task.corpus is None:
        raise InputError(f"{key.rpartition('.')[0]}: data={data.name} holds no text for a language model")
    if own is not None and length > own.longest:
        raise InputError(f"{key}={length}: must be at most {own.longest}, the context of model={model.name}")
    return task.corpus
