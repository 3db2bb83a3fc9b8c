"""Answering token by token with a key and value cache: what a causal model offers, and the loops over it.

Shapes: B samples, P tokens of a prompt, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Pick = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Any], Tensor]


@runtime_checkable
class Decoding(Protocol):
    """A model that reads tokens, remembers them in a cache, and says what comes next."""

    @property
    def context(self) -> int:
        """Most tokens that it can read, prompt and answer together."""
        ...

    def new_cache(self, longest: int | None = None) -> Any:
        """An empty cache: one that grows, or one of a fixed length in place (which compiled code needs)."""
        ...

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Read tokens (B, T) at positions (B, T) into the cache; logits of the token after the last, (B, V)."""
        ...


def positions_of(tokens: Tensor, first: int = 0) -> Tensor:
    """Positions of tokens (B, T) that start at `first`, (B, T)."""
    return torch.arange(first, first + tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token, (B, V) to (B, 1); the lowest index among equals."""
    return logits.argmax(dim=-1, keepdim=True)


@torch.inference_mode()
def generate(model: Decoding, prompt: Tensor, count: int, pick: Pick = greedy) -> Tensor:
    """Continue a prompt by exactly `count` tokens; no end-of-sequence token stops it.

    Args:
        model: Reads and answers.
        prompt: (B, P) on the model's device.
        count: New tokens, at least 1.
        pick: Chooses from logits (B, V) a token (B, 1).

    Returns:
        The new tokens, (B, count).
    """
    cache = model.new_cache()
    first = pick(model.next_logits(prompt, positions_of(prompt), cache))
    return decoded(model.next_logits, first, prompt.shape[1], count, cache, pick)


def decoded(step: Step, first: Tensor, past: int, count: int, cache: Any, pick: Pick = greedy) -> Tensor:
    """Go on after a prompt that lies in the cache: `count - 1` steps of one token each.

    Args:
        step: `Decoding.next_logits`, or a compiled one.
        first: The first new token, (B, 1).
        past: Tokens in the cache, P.
        count: New tokens in all, `first` included.
        cache: Holds the prompt; afterwards also all new tokens but the last.
        pick: Chooses from logits (B, V) a token (B, 1).

    Returns:
        (B, count).
    """
    places = torch.arange(past, past + count, device=first.device).expand(len(first), -1)
    found = [first]
    for number in range(count - 1):
        found.append(pick(step(found[-1], places[:, number : number + 1], cache)))
    return torch.cat(found, dim=1)


def forked(cache: Any) -> Any:
    """A growing cache that goes on from another one, which stays as it is; the tensors are shared.

    Growing caches never write into a tensor: a longer one takes its place.
    """
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def rewind(cache: Any, past: int) -> None:
    """Set a cache of fixed length back to its first `past` tokens; what lies behind them is not read."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(past)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
