"""Token merging: alternate tokens into two sets, match them by similarity, merge the strongest pairs.

Bolya et al., Token Merging (ToMe, ICLR 2023, arXiv:2210.09461), section 3, from the formulas. A merged
token is the mean of its members by size; attention counts a token as often as it has members.

Shapes: B samples, T tokens, D width, P protected tokens in front (CLS, distillation, registers),
E and O matched tokens at even and odd positions, r tokens merged away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from utils.errors import InputError, RunError

Half = Literal["mlp", "attention"]
Metric = Literal["keys", "tokens"]
SETTINGS = ("merged", "before", "proportional", "metric", "importance", "growth")
# what schedules written before these settings mean
ADDED: Mapping[str, Any] = {"metric": "keys", "importance": 0.0, "growth": 0.0}


@dataclass(frozen=True)
class Reduction:
    """How many tokens are merged away in each block, and where.

    Attributes:
        merged: Tokens merged away per block; a block takes fewer where that many pairs are not there.
        before: Half of the block that the merge comes before. Before the attention, a block matches
            by the keys of the block before it, so that the first block merges nothing.
        proportional: Whether attention logits gain the logarithm of each key's size.
        metric: What tokens are compared by: the mean over heads of their `keys`, or the `tokens` themselves.
        importance: How much it speaks against a pair that the class token attends to its members: the similarity is
            lowered by this, times what each gets of that attention by member, as a multiple of the mean.
        growth: How much it speaks against a pair that it stands for many tokens: the similarity is lowered by
            this, times the logarithm of their number.
    """

    merged: tuple[int, ...]
    before: Half = "mlp"
    proportional: bool = True
    metric: Metric = "keys"
    importance: float = 0.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        if bad := [r for r in self.merged if type(r) is not int or r < 0]:
            raise InputError(f"merged={list(self.merged)}: {bad[0]!r} must be a whole number of at least 0")
        if self.before not in ("mlp", "attention"):
            raise InputError(f"before={self.before!r}: must be mlp or attention")
        if type(self.proportional) is not bool:
            raise InputError(f"proportional={self.proportional!r}: must be true or false")
        if self.metric not in ("keys", "tokens"):
            raise InputError(f"metric={self.metric!r}: must be keys or tokens")
        for name, weight in (("importance", self.importance), ("growth", self.growth)):
            if type(weight) not in (int, float) or not 0 <= weight < inf:
                raise InputError(f"{name}={weight!r}: must be a number of at least 0")
        if self.before == "attention" and self.merged and self.merged[0]:
            raise InputError(
                f"merged={list(self.merged)}: before the attention the first block must merge 0 tokens, "
                "it has no keys to match by"
            )

    @property
    def blocks(self) -> int:
        """Blocks of the network."""
        return len(self.merged)

    @property
    def merges(self) -> bool:
        """Whether any token goes."""
        return any(self.merged)

    def refuse_misfit(self, blocks: int) -> None:
        """Raise an InputError if the schedule is not one for a network of that many blocks."""
        if len(self.merged) != blocks:
            raise InputError(f"merged={list(self.merged)}: has {len(self.merged)} entries for {blocks} blocks")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in SETTINGS} | {"merged": list(self.merged)}

    @classmethod
    def from_json(cls, found: Any) -> "Reduction":
        """Undo `to_json`; refuses anything else with an InputError."""
        whole = {**ADDED, **found} if isinstance(found, Mapping) else {}
        if whole.keys() != set(SETTINGS):
            raise InputError(f"a token reduction has the keys {', '.join(SETTINGS)}, and no other")
        if not isinstance(whole["merged"], list):
            raise InputError(f"merged={whole['merged']!r}: must be a list")
        return cls(**{**whole, "merged": tuple(whole["merged"])})


def mergeable(tokens: int, protected: int) -> int:
    """Most tokens that one merge can take away."""
    return max(tokens - protected, 0) // 2


def counts(reduction: Reduction, tokens: int, protected: int) -> list[tuple[int, int]]:
    """Tokens that enter the attention and the MLP of each block.

    Args:
        reduction: The schedule.
        tokens: Tokens that enter the first block, the protected ones included.
        protected: Tokens in front that are never merged.
    """
    found = []
    for merged in reduction.merged:
        left = tokens - min(merged, mergeable(tokens, protected))
        found.append((tokens if reduction.before == "mlp" else left, left))
        tokens = left
    return found


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which.

    Attributes:
        kept: Matched even tokens that stay, (B, E - r), ascending positions among the E.
        gone: Even tokens that are merged away, (B, r), positions among the E.
        target: Where each of them goes, (B, r), positions among the O.
        protected: Tokens in front that take no part, P.
    """

    kept: Tensor
    gone: Tensor
    target: Tensor
    protected: int


@torch.no_grad()
def match(metric: Tensor, r: int, protected: int, against: Tensor | None = None) -> Matching:
    """Pair each even token with the most similar odd one and take the r most similar pairs.

    Similarity is the cosine of the metric. Equal ones go by the lower position, so that the
    result is the same on every run.

    Args:
        metric: Features to compare tokens by, (B, T, D).
        r: Pairs to merge, at most `mergeable(T, protected)`.
        protected: Tokens in front that neither propose nor are proposed to.
        against: What the similarity of each pair of an even and an odd token is lowered by, (B, all even, all odd).
    """
    most = mergeable(metric.shape[1], protected)
    if not 0 <= r <= most:
        raise ValueError(f"r={r}: must be in [0, {most}] for {metric.shape[1]} tokens, {protected} of them protected")
    unit = normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    alike = unit[:, ::2] @ unit[:, 1::2].mT  # (B, T, D) -> (B, all even, all odd)
    alike = alike if against is None else alike - against
    alike = alike[:, (protected + 1) // 2 :, protected // 2 :]  # (B, E, O)
    strength, partner = alike.max(dim=-1)  # (B, E)
    order = strength.argsort(dim=-1, descending=True, stable=True)
    gone = order[:, :r]
    return Matching(order[:, r:].sort(dim=-1).values, gone, partner.gather(1, gone), protected)


def reluctance(reduction: Reduction, size: Tensor, attention: Tensor | None) -> Tensor | None:
    """What speaks against merging each pair, (B, all even, all odd); None for nothing.

    Args:
        reduction: Says how much importance and growth count.
        size: How many of the first tokens each one stands for, (B, T, 1).
        attention: What the class token gives to each of them, (B, T); None where importance does not count.
    """
    found = None
    if reduction.growth:
        found = reduction.growth * (size[:, ::2] + size[:, 1::2].mT).log()
    if reduction.importance and attention is not None:
        by_member = attention / attention.mean(dim=1, keepdim=True) / size[..., 0]
        pairs = reduction.importance * (by_member[:, ::2, None] + by_member[:, None, 1::2])
        found = pairs if found is None else found + pairs
    return found


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge matched tokens into their targets: the mean by size, and the sum of the sizes.

    The order of what is left: protected tokens, even ones that stay, odd ones.

    Args:
        x: Tokens, (B, T, D).
        size: How many of the first tokens each one stands for, (B, T, 1).
        matching: Which tokens merge.

    Returns:
        Tokens (B, T - r, D) in the type of `x`, and sizes (B, T - r, 1).
    """
    front, even, odd = _parted(x, matching.protected)
    front_size, even_size, odd_size = _parted(size, matching.protected)
    gone_size, wide = _taken(even_size, matching.gone), torch.promote_types(x.dtype, size.dtype)
    sums = _added(odd.to(wide) * odd_size, matching.target, _taken(even, matching.gone).to(wide) * gone_size)
    odd_size = _added(odd_size, matching.target, gone_size)
    merged = torch.cat([front, _taken(even, matching.kept), (sums / odd_size).to(x.dtype)], dim=1)
    return merged, torch.cat([front_size, _taken(even_size, matching.kept), odd_size], dim=1)


def _parted(x: Tensor, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Protected tokens, and the others at even and odd positions: (B, P, D), (B, E, D), (B, O, D)."""
    return x[:, :protected], x[:, protected + protected % 2 :: 2], x[:, protected + 1 - protected % 2 :: 2]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _added(x: Tensor, index: Tensor, more: Tensor) -> Tensor:
    return x.scatter_add(1, index.unsqueeze(-1).expand_as(more), more)


class Flow:
    """What the blocks of one network tell each other during one forward pass; they share it.

    Attributes:
        reduction: The schedule.
        protected: Tokens in front that are never merged.
        averaged: Whether the network ends with `mean`, which needs the sizes after the last block.
        size: How many of the first tokens each token stands for, (B, T, 1); None as long as each
            stands for itself, so that the dense kernels run.
    """

    def __init__(self, reduction: Reduction, protected: int, averaged: bool = False) -> None:
        self.reduction, self.protected, self.averaged = reduction, protected, averaged
        self.size: Tensor | None = None
        self._keys: Tensor | None = None
        self._attention: Tensor | None = None
        self._layer = -1

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts anew, also from a pass that broke off
        return vars(self) | {"size": None, "_keys": None, "_attention": None, "_layer": -1}

    def enter(self, x: Tensor, layer: int) -> Tensor:
        """Begin a block: (B, T, D), with fewer tokens if it merges before its attention."""
        if layer == 0:
            self.size = self._keys = self._attention = None
        elif layer != self._layer + 1:
            raise RunError(
                f"block {layer} ran after block {self._layer}: blocks of a network that merges tokens must run "
                "one after the other, each once; scores that replay some of them need a network without merging"
            )
        self._layer = layer
        return self._merged(x) if self.reduction.before == "attention" else x

    def leave_attention(self, x: Tensor) -> Tensor:
        """Between the halves of a block: (B, T, D), with fewer tokens if it merges before its MLP."""
        x = self._merged(x) if self.reduction.before == "mlp" else x
        if self._layer == len(self.reduction.merged) - 1 and not self.averaged:
            self.size = None  # nothing of a pass outlives it
        return x

    def leave(self, x: Tensor) -> Tensor:
        """End a block."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dense: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Mix values (B, H, T, dh) by the network's own attention, each token counted by its size."""
        self._note(q, k, scale)
        return dense(self.bias(q))

    def bias(self, x: Tensor) -> Tensor | None:
        """What proportional attention adds to the logits of each key, (B, 1, 1, T); None for nothing."""
        if self.size is None or not self.reduction.proportional:
            return None
        return self.size.log().to(x.dtype)[:, None, None, :, 0]  # (B, T, 1) -> (B, 1, 1, T)

    def _note(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Keep what the next merge looks at: the mean over heads of keys (B, H, T, dh), the class token's attention.

        An attention that has lost all heads has neither; tokens are then compared by themselves.
        """
        merged = self.reduction.merged
        following = self._layer + (self.reduction.before == "attention")
        wanted = following < len(merged) and merged[following] > 0 and k.shape[1] > 0
        wide = torch.promote_types(k.dtype, torch.float32)
        by_keys = wanted and self.reduction.metric == "keys"
        self._keys = k.detach().mean(dim=1, dtype=wide) if by_keys else None
        self._attention = self._of_class_token(q, k, scale) if wanted and self.reduction.importance else None

    def _of_class_token(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """What the first token attends to, the mean over heads, (B, T), float32 at least."""
        logits = (q.detach()[:, :, :1] * scale) @ k.detach().mT  # (B, H, 1, T)
        bias = self.bias(q)
        logits = logits if bias is None else logits + bias
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=1)[:, 0]

    def mean(self, x: Tensor, front: int) -> Tensor:
        """Mean over the tokens behind the first `front`, by size: (B, T, D) -> (B, D)."""
        size, self.size = self.size, None
        if size is None:
            return x[:, front:].mean(dim=1)
        weight = size[:, front:]
        wide = torch.promote_types(x.dtype, weight.dtype)
        return ((x[:, front:].to(wide) * weight).sum(dim=1) / weight.sum(dim=1)).to(x.dtype)

    def _merged(self, x: Tensor) -> Tensor:
        r = min(self.reduction.merged[self._layer], mergeable(x.shape[1], self.protected))
        keys, self._keys = self._keys, None
        attention, self._attention = self._attention, None
        if r == 0:
            return x
        size = self.size
        if size is None:
            size = x.new_ones((*x.shape[:2], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        against = reluctance(self.reduction, size, attention)
        x, self.size = merge(x, size, match(x if keys is None else keys, r, self.protected, against))
        return x
