"""What can be counted in generated text, and how tokens are drawn: pure functions.

Shapes: B samples, V vocabulary.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

REPEATED = 4


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of `n` neighbours, in order; none if there are fewer tokens."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of several token sequences together (Li et al., 2016, arXiv:1510.03055).

    None where no sequence has `n` tokens.
    """
    found = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def repetition_rate(tokens: Sequence[Hashable], n: int = REPEATED) -> float | None:
    """Share of a sequence's n-grams that have occurred in it before: `1 - distinct n-grams / n-grams`.

    The seq-rep-n of Welleck et al., 2020 (arXiv:1908.04319); 0 where nothing comes twice, close to 1 for a loop.
    None where it has fewer than `n` tokens.
    """
    share = distinct([tokens], n)
    return None if share is None else 1 - share


def nucleus(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities of the fewest likeliest tokens that hold `top_p` of the mass (Holtzman et al., arXiv:1904.09751).

    Args:
        logits: (B, V).
        temperature: Divides the logits, above 0.
        top_p: Mass to keep, in (0, 1]; one token stays at least.

    Returns:
        (B, V) in float32, each row sums to 1.
    """
    # from the largest down, which no temperature makes infinite
    below = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    shares, order = (below / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(dim=-1) - shares
    kept = torch.where(before < top_p, shares, 0.0)
    kept[:, 0] = shares[:, 0]
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))


def sampler(seed: int, temperature: float, top_p: float) -> Callable[[Tensor], Tensor]:
    """Draws tokens (B, 1) from logits (B, V); the same draws for the same seed, whatever the device."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> Tensor:
        chances = nucleus(logits, temperature, top_p).cpu()
        return torch.multinomial(chances, 1, generator=generator).to(logits.device)

    return pick
