"""LTP's rule: tokens that receive enough attention stay.

Kim et al., Learned Token Pruning for Transformers (KDD 2022, arXiv:2107.00910), section 3. Its thresholds are
trained; here they are calibrated, or given. Tokens really go, between attention and MLP.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.keeping import Need, Rule, Signals
from prune.tokens.method import Thresholded
from prune.tokens.rules import Above, BestShare


def received(signals: Signals) -> Tensor:
    """`s_j = sum_heads sum_i A[i, j] / (H T)` over the T tokens of the sample that are left, (...)."""
    assert signals.received is not None
    return signals.received


@dataclass(frozen=True)
class ReceivedAbove(Above):
    """Keeps tokens that receive a constant or more."""

    needs: ClassVar[frozenset[Need]] = frozenset({"received"})
    strict: ClassVar[bool] = False
    name: ClassVar[str] = "attention_threshold"

    def scores(self, signals: Signals) -> Tensor:
        """Attention received, (...)."""
        return received(signals)


@dataclass(frozen=True)
class MostReceived(BestShare):
    """Keeps the tokens of each sample that receive most."""

    needs: ClassVar[frozenset[Need]] = frozenset({"received"})
    name: ClassVar[str] = "attention_threshold"

    def scores(self, signals: Signals) -> Tensor:
        """Attention received, (...)."""
        return received(signals)


@dataclass(frozen=True, kw_only=True)
class AttentionThreshold(Thresholded):
    """Keeps tokens by the attention that they receive, above fixed or calibrated constants."""

    name: ClassVar[str] = "attention_threshold"

    def rule(self, keeps: tuple[float, ...]) -> Rule:
        """The rule that keeps the same share of every sample."""
        return MostReceived(keeps, self.min_k)

    def rule_above(self, thresholds: tuple[float, ...]) -> Above:
        """The rule with these constants."""
        return ReceivedAbove(thresholds, self.min_k)
