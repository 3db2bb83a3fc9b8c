"""Tokens by their length: those whose norm lies above a constant stay.

That long tokens carry the answer is a hypothesis: in large vision transformers the longest ones sit in patches of
little information (Darcet et al., Vision Transformers Need Registers, ICLR 2024, arXiv:2309.16588). Hold it
against `random_k` at equal MACs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.linalg import vector_norm

from models.keeping import Need, Rule, Signals
from models.merging import Half
from prune.tokens.method import Thresholded
from prune.tokens.rules import Above, BestShare

Of = Literal["token", "value"]


def norms(signals: Signals) -> Tensor:
    """`||x_j||_2`, or `||V_j||_2` over all heads together where values are seen, (...)."""
    x = signals.tokens if signals.values is None else signals.values.flatten(-2)  # (..., H, dh) -> (..., H*dh)
    return vector_norm(x.float(), dim=-1)


@dataclass(frozen=True)
class NormAbove(Above):
    """Keeps tokens longer than a constant."""

    name: ClassVar[str] = "threshold_l2"

    def scores(self, signals: Signals) -> Tensor:
        """Norms, (...)."""
        return norms(signals)


@dataclass(frozen=True)
class ValueNormAbove(NormAbove):
    """Keeps tokens whose values are longer than a constant."""

    needs: ClassVar[frozenset[Need]] = frozenset({"values"})


@dataclass(frozen=True)
class LargestNorms(BestShare):
    """Keeps the longest tokens of each sample."""

    name: ClassVar[str] = "threshold_l2"

    def scores(self, signals: Signals) -> Tensor:
        """Norms, (...)."""
        return norms(signals)


@dataclass(frozen=True)
class LargestValueNorms(LargestNorms):
    """Keeps the tokens with the longest values of each sample."""

    needs: ClassVar[frozenset[Need]] = frozenset({"values"})


@dataclass(frozen=True, kw_only=True)
class ThresholdL2(Thresholded):
    """Keeps tokens by their L2 norm: above fixed or calibrated constants, or the longest of each sample.

    Attributes:
        score: Norm of the `token` as it enters the block, which then goes before the attention, or of its
            `value` in the attention, after which it goes.
        select: `threshold`: above a constant, which keeps more of some samples than of others; `topk`: the
            same share of every sample.
    """

    score: Of = "token"
    select: Literal["threshold", "topk"] = "threshold"

    name: ClassVar[str] = "threshold_l2"

    @property
    def half(self) -> Half:
        """Half of the block that tokens go before."""
        return "attention" if self.score == "token" else "mlp"

    @property
    def by_threshold(self) -> bool:
        """Whether constants decide."""
        return self.select == "threshold"

    def rule(self, keeps: tuple[float, ...]) -> Rule:
        """The rule that keeps the same share of every sample."""
        return (LargestNorms if self.score == "token" else LargestValueNorms)(keeps, self.min_k)

    def rule_above(self, thresholds: tuple[float, ...]) -> Above:
        """The rule with these constants."""
        return (NormAbove if self.score == "token" else ValueNormAbove)(thresholds, self.min_k)
