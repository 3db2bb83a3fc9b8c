"""Perplexity per token by the token-chunk protocol, `<text>/token-chunk@L`.

The text is tokenised once and cut into chunks of exactly L tokens, without overlap; the tail is dropped. The
first token of a chunk is context only. With `m_c` the mean over the L - 1 others of `-log p(token | chunk so far)`,
the perplexity of n chunks is `exp(sum_c m_c / n)`. Figures of different L, or of another protocol, don't compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.base import TensorBatches
from data.corpus import token_hash
from data.language_modelling import IGNORED, LanguageModelling, exponential, next_tokens
from evals.base import Measurement, Measurements, Subject
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

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model on the same chunks."""
        return [{"perplexity": self._perplexity(subject)} for subject in subjects]

    def _perplexity(self, subject: Subject) -> Measurement:
        if reason := unmeasurable(subject, self.length, "evals.perplexity.length"):
            return Measurement(None, UNIT, reason)
        corpus = subject.data.task.corpus  # type: ignore[attr-defined]
        chunks = corpus.chunks(self.length)
        if not len(chunks) or self.length < 2:
            rule = f"must be from 2 to {len(corpus.tokens)}, all tokens that {corpus.name} has"
            return Measurement(None, UNIT, f"evals.perplexity.length={self.length}: {rule}")
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
            **numerics(subject),
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


def unmeasurable(subject: Subject, length: int, key: str) -> str | None:
    """Why a perplexity in windows of this many tokens can't be measured; None if it can."""
    task, own = subject.data.task, subject.model.preprocessing
    if not isinstance(task, LanguageModelling) or task.corpus is None:
        return f"data={subject.data.name} holds no text for a language model"
    if own is not None and length > own.longest:
        return f"{key}={length}: must be at most {own.longest}, the context of model={subject.model.name}"
    return None


def numerics(subject: Subject) -> dict[str, str]:
    """What the last digits of a perplexity depend on."""
    return {"dtype": str(subject.model.dtype).removeprefix("torch."), "loss_dtype": "float32"}
