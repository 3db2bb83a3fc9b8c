"""Token merging: alternate tokens into two sets, match them by similarity, merge the strongest pairs.

Bolya et al., Token Merging (ToMe, ICLR 2023, arXiv:2210.09461), section 3, from the formulas. A merged
token is the mean of its members by size; attention counts a token as often as it has members.

Shapes: B samples, T tokens, D width, P protected tokens in front (CLS, distillation, registers),
E and O matched tokens at even and odd positions, r tokens merged away.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from utils.errors import InputError

Half = Literal["mlp", "attention"]
Metric = Literal["keys", "tokens"]
SETTINGS = ("merged", "before", "proportional", "metric", "importance", "growth", "front_only")
# what schedules written before these settings mean
ADDED: Mapping[str, Any] = {"metric": "keys", "importance": 0.0, "growth": 0.0, "front_only": False}


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
        front_only: Whether the last block asks and answers for the protected tokens alone. That is exact where the
            head reads no other one; all tokens give it keys and values.
    """

    merged: tuple[int, ...]
    before: Half = "mlp"
    proportional: bool = True
    metric: Metric = "keys"
    importance: float = 0.0
    growth: float = 0.0
    front_only: bool = False

    def __post_init__(self) -> None:
        if bad := [r for r in self.merged if type(r) is not int or r < 0]:
            raise InputError(f"merged={list(self.merged)}: {bad[0]!r} must be a whole number of at least 0")
        if self.before not in ("mlp", "attention"):
            raise InputError(f"before={self.before!r}: must be mlp or attention")
        if type(self.proportional) is not bool:
            raise InputError(f"proportional={self.proportional!r}: must be true or false")
        if self.metric not in ("keys", "tokens"):
            raise InputError(f"metric={self.metric!r}: must be keys or tokens")
        if type(self.front_only) is not bool:
            raise InputError(f"front_only={self.front_only!r}: must be true or false")
        if self.front_only and self.before == "mlp" and self.merged[-1:] not in ((), (0,)):
            raise InputError(
                f"merged={list(self.merged)}: with front_only the last block must merge 0 tokens, its MLP gets only "
                "protected ones"
            )
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

    def in_front(self, layer: int) -> bool:
        """Whether a block asks and answers for the protected tokens alone."""
        return self.front_only and layer == self.blocks - 1

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

    Where the last block asks for the protected tokens alone, its attention still gets all of them, as keys.

    Args:
        reduction: The schedule.
        tokens: Tokens that enter the first block, the protected ones included.
        protected: Tokens in front that are never merged.
    """
    found = []
    for merged in reduction.merged:
        left = tokens - min(merged, mergeable(tokens, protected))
        attention, mlp = tokens if reduction.before == "mlp" else left, left
        found.append((attention, protected if reduction.in_front(len(found)) else mlp))
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


def places(matching: Matching, tokens: int) -> Tensor:
    """Where `merge` puts each of so many tokens, (B, T) int64."""
    kept, front = matching.kept.shape[1], matching.protected
    found = matching.gone.new_empty(len(matching.gone), tokens)
    first, even, odd = (part[..., 0] for part in _parted(found[..., None], front))  # views: (B, P), (B, E), (B, O)
    first[:] = torch.arange(front, device=found.device)
    even.scatter_(1, matching.kept, front + torch.arange(kept, device=found.device).expand_as(matching.kept))
    even.scatter_(1, matching.gone, front + kept + matching.target)
    odd[:] = front + kept + torch.arange(odd.shape[1], device=found.device)
    return found


def member_means(x: Tensor, source: Tensor) -> Tensor:
    """Mean of the first tokens that each merged one stands for: (B, T, D) -> (B, T - r, D).

    Args:
        x: Features of the first tokens.
        source: Which merged token each of them is part of, (B, T); none is without a part.
    """
    left = int(source.max()) + 1
    wide = torch.promote_types(x.dtype, torch.float32)
    # samples one after the other: adding whole rows is many times as fast as adding single numbers by their index
    place = (source + left * torch.arange(len(x), device=x.device)[:, None]).flatten()  # (B, T) -> (B * T,)
    sums = x.new_zeros(len(x) * left, x.shape[-1], dtype=wide).index_add_(0, place, x.to(wide).flatten(0, 1))
    members = place.bincount(minlength=len(x) * left)
    return (sums / members.unsqueeze(-1)).to(x.dtype).unflatten(0, (len(x), left))  # (B * T', D) -> (B, T', D)


def _parted(x: Tensor, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Protected tokens, and the others at even and odd positions: (B, P, D), (B, E, D), (B, O, D)."""
    return x[:, :protected], x[:, protected + protected % 2 :: 2], x[:, protected + 1 - protected % 2 :: 2]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _added(x: Tensor, index: Tensor, more: Tensor) -> Tensor:
    return x.scatter_add(1, index.unsqueeze(-1).expand_as(more), more)
