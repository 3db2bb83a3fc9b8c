"""EViT: the tokens that the class token attends to most stay, the others may leave one fused token.

Liang et al., Not All Patches are What You Need (ICLR 2022, arXiv:2202.07800), section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.keeping import Fuse, Need, Signals
from prune.tokens.method import TokenMethod
from prune.tokens.rules import BestShare


@dataclass(frozen=True)
class ClassAttention(BestShare):
    """Scores a token by what the class token pays to it, the mean over heads."""

    needs: ClassVar[frozenset[Need]] = frozenset({"attention"})
    name: ClassVar[str] = "evit"

    def scores(self, signals: Signals) -> Tensor:
        """Mean over heads of `A[cls, j]`, (...)."""
        assert signals.attention is not None
        return signals.attention.mean(-1)


@dataclass(frozen=True, kw_only=True)
class Evit(TokenMethod):
    """Keeps the tokens with the highest attention of the class token, between attention and MLP.

    Attributes:
        fused: Whether the dropped tokens of a sample leave one token, their sum by attention.
        normalized: Whether that token is their mean by attention instead of the sum.
    """

    fused: bool = True
    normalized: bool = False

    name: ClassVar[str] = "evit"
    needs_class_token: ClassVar[bool] = True

    def rule(self, keeps: tuple[float, ...]) -> ClassAttention:
        """The rule with these shares."""
        return ClassAttention(keeps, self.min_k)

    @property
    def fuse(self) -> Fuse:
        """What dropped tokens leave."""
        return ("mean" if self.normalized else "sum") if self.fused else "none"
