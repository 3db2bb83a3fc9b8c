"""Tokens by what they bring the class token: the attention that it pays to them times the size of their values."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from models.keeping import Need, Signals
from prune.tokens.method import TokenMethod
from prune.tokens.rules import BestShare


def value_attention(signals: Signals) -> Tensor:
    """`||V_j|| sum_heads A[cls, j]`, the norm over all heads together, (...)."""
    assert signals.attention is not None and signals.values is not None
    sizes = vector_norm(signals.values.flatten(-2).float(), dim=-1)  # (..., H, dh) -> (...)
    return signals.attention.sum(-1) * sizes


@dataclass(frozen=True)
class ValueAttention(BestShare):
    """Scores a token by `||V_j|| A[cls, j]`."""

    needs: ClassVar[frozenset[Need]] = frozenset({"attention", "values"})
    name: ClassVar[str] = "value_attention"

    def scores(self, signals: Signals) -> Tensor:
        """Attention times value norm, (...)."""
        return value_attention(signals)


@dataclass(frozen=True, kw_only=True)
class ValueAttentionTokens(TokenMethod):
    """Keeps the tokens with the highest value norm times attention of the class token."""

    name: ClassVar[str] = "value_attention"
    needs_class_token: ClassVar[bool] = True

    def rule(self, keeps: tuple[float, ...]) -> ValueAttention:
        """The rule with these shares."""
        return ValueAttention(keeps, self.min_k)
