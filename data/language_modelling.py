"""The task of predicting the next token: logits (B, T, V), one distribution a token.

B samples, T tokens, V vocabulary. Logits are taken to float32 a slice of the sequence at a time: those
of 2,048 tokens over 128,256 words take a gibibyte.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from data.base import Batch, Figure, Predictions, divergences
from data.corpus import Corpus

IGNORED = -100
ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class LanguageModelling:
    """Next-token prediction; samples are `input_ids`, `attention_mask` (B, T) where some tokens are padding.

    What is predicted is `targets` (B, T), -100 where nothing is; without it the token that follows.

    Attributes:
        vocabulary: Token ids that the data may hold, from 0.
        protocol: Name of what the validation loss stands for, such as `wikitext2-test/token-chunk@2048`.
        corpus: The validation text, which perplexities are measured on; None without one.
        token_hash: Hash of the validation samples' token ids; None where it is not known.
        name: What the task is called.
    """

    vocabulary: int
    protocol: str = "token-chunk"
    corpus: Corpus | None = field(default=None, repr=False, compare=False)
    token_hash: str | None = field(default=None, compare=False)
    name: str = "language_modelling"

    @property
    def targets(self) -> tuple[str, ...]:
        """The tokens, which of them are real, and what is predicted where that is told."""
        return ("input_ids", "attention_mask", "targets")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Perplexity and accuracy per token."""
        return ("token_perplexity", "token_accuracy")

    @property
    def facts(self) -> dict[str, Any]:
        """How the validation samples were cut, and which tokens they hold."""
        return {"protocol": self.protocol, "token_hash": self.token_hash}

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the next token in nats, over all tokens of the batch that have one."""
        wanted = next_tokens(batch).flatten()  # (B * T,)
        return cross_entropy(
            logits.float().flatten(0, 1), wanted, ignore_index=IGNORED, label_smoothing=label_smoothing
        )

    def weight(self, batch: Batch) -> int:
        """Its tokens that have a next one."""
        return int((next_tokens(batch) != IGNORED).sum())

    def condensed(self, logits: Tensor, batch: Batch) -> Tensor:
        """Per token its cost in nats and whether the likeliest one was right, (B, T, 2); zero where nothing counts."""
        return token_costs(logits, next_tokens(batch))

    def mean_loss(self, predictions: Predictions) -> float:
        """Nats per predicted token over a whole split."""
        nats, _, count = _totals(predictions)
        return nats / count

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """Perplexity per token of the validation samples, and how often the likeliest next token is right."""
        nats, hits, count = _totals(predictions)
        details = {**self.facts, "predicted": count, "loss_dtype": "float32"}
        return {
            "token_perplexity": Figure(exponential(nats / count), details, unit="per token"),
            "token_accuracy": Figure(hits / count, details),
        }

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Share of each sample's tokens whose successor is the likeliest one, (B,)."""
        wanted = next_tokens(batch)
        right = (logits.argmax(dim=-1) == wanted).float().sum(dim=1)
        return {"token_accuracy": right / (wanted != IGNORED).sum(dim=1).clamp(min=1)}

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, the mean over all tokens."""
        wanted, given = (
            log_softmax(logits.float().flatten(0, 1) / temperature, dim=-1)  # (B * T, V)
            for logits in (teacher, student)
        )
        return temperature**2 * kl_div(given, wanted, log_target=True, reduction="batchmean")

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """KL at every real token, summed over each sample: (..., B, T, V) against (B, T, V) to (..., B)."""
        real = real_tokens(batch)
        total = torch.zeros(given.shape[:-2], device=given.device)
        for part in slices(given):
            total += (divergences(given[..., part, :], wanted[..., part, :]) * real[:, part]).sum(dim=-1)
        return total

    def distributions(self, logits: Tensor, batch: Batch) -> Tensor:
        """One distribution a token, (B, T, V); padding is certain of token 0, so that nothing moves it."""
        padded = ~real_tokens(batch)[..., None]  # (B, T, 1)
        if not bool(padded.any()):
            return logits
        certain = torch.full_like(logits[:1, :1], -torch.inf)
        certain[..., 0] = 0.0
        return torch.where(padded, certain, logits)

    def misfit(self, logits: Tensor) -> str | None:
        """Refuse logits that are not one for each token of the vocabulary."""
        if logits.ndim == 3 and logits.shape[2] >= self.vocabulary:
            return None
        shape = ", ".join(["B", *map(str, logits.shape[1:])])
        return f"the model's logits have shape ({shape}), the data needs (B, T, V) with V at least {self.vocabulary}"


def next_tokens(batch: Batch) -> Tensor:
    """What each position predicts, (B, T); -100 where it predicts nothing: at the end, and at padding."""
    if "targets" in batch:
        return batch["targets"]
    real = real_tokens(batch)
    wanted = torch.full_like(batch["input_ids"], IGNORED)
    wanted[:, :-1] = batch["input_ids"][:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    return wanted


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens are no padding, (B, T) bool."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()


def token_costs(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cost of every predicted token, whatever the logits' dtype in float32.

    Args:
        logits: (B, T, V).
        wanted: Token ids, (B, T); -100 where nothing is predicted.

    Returns:
        (B, T, 2) in float32: negative log-likelihood in nats, and 1 where the likeliest token is the wanted
        one; zeros where nothing is predicted.
    """
    costs = torch.zeros(*wanted.shape, 2, device=logits.device)
    for part in slices(logits):
        scores, tokens = logits[:, part].float(), wanted[:, part]
        costs[:, part, 0] = cross_entropy(scores.transpose(1, 2), tokens, ignore_index=IGNORED, reduction="none")
        costs[:, part, 1] = (scores.argmax(dim=-1) == tokens).float()
    return costs


def slices(logits: Tensor) -> Iterator[slice]:
    """Parts of the sequence whose float32 logits (..., T, V) are small enough to be held at once."""
    length = logits.shape[-2]
    step = max(1, ELEMENTS_AT_ONCE * length // max(1, logits.numel()))
    return (slice(first, first + step) for first in range(0, length, step))


def exponential(nats: float) -> float:
    """`exp`, infinite where it is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf


def _totals(predictions: Predictions) -> tuple[float, float, int]:
    """Nats, hits and number of predicted tokens over a whole split, summed in float64."""
    nats, hits, count = 0.0, 0.0, 0
    for costs, batch in predictions:
        sums = costs.double().flatten(0, -2).sum(dim=0)
        nats, hits = nats + float(sums[0]), hits + float(sums[1])
        count += int((next_tokens(batch) != IGNORED).sum())
    return nats, hits, count
