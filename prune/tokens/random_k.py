"""Random tokens: the control that every other rule must beat."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from models.keeping import Signals
from models.merging import Half
from prune.tokens.method import TokenMethod
from prune.tokens.rules import BestShare
from utils.rules import Seed

# odd 64-bit factors with well-mixed bits (the constants of splitmix64)
MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def random_scores(positions: Tensor, layer: int, seed: int) -> Tensor:
    """Numbers in [0, 1) from a token's place, the block and a seed alone: the same in any batch, (...) float32."""
    start = ((layer + 1) * MIX[1] + (seed + 1) * MIX[2]) % (1 << 64)
    bits = (positions + 1) * MIX[0] + (start - ((start >> 63) << 64))
    for shift, factor in ((30, MIX[1]), (27, MIX[2])):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 31)
    return (bits & 0xFFFFFF).float() / (1 << 24)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right with zeros from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True)
class RandomTokens(BestShare):
    """Scores a token by chance.

    Attributes:
        seed: Decides the chances.
    """

    seed: int = 0
    name: ClassVar[str] = "random_k"

    def scores(self, signals: Signals) -> Tensor:
        """Chance, (...)."""
        return random_scores(signals.positions, signals.layer, self.seed)

    def settings(self) -> dict[str, Any]:
        """What it is built with, as plain values."""
        return {**super().settings(), "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class RandomK(TokenMethod):
    """Keeps a random share of the tokens, at the same places of every sample.

    Attributes:
        seed: Decides which.
        before: Half of the block that tokens go before.
    """

    seed: Seed = 0
    before: Half = "attention"

    name: ClassVar[str] = "random_k"
    scored: ClassVar[bool] = False

    def rule(self, keeps: tuple[float, ...]) -> RandomTokens:
        """The rule with these shares."""
        return RandomTokens(keeps, self.min_k, self.seed)

    @property
    def half(self) -> Half:
        """Half of the block that tokens go before."""
        return self.before
