"""Adaptive token sampling: as many tokens as the distribution of their significance asks for.

Fayyaz et al., Adaptive Token Sampling (ECCV 2022, arXiv:2111.15667), section 3.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from models.keeping import Need, Signals
from prune.tokens.method import TokenMethod
from prune.tokens.rules import refuse_bad_floor
from prune.tokens.selection import sampled, share_of, shares_of, top_k
from prune.tokens.value_attention import value_attention
from utils.errors import InputError

MOST = 64


@dataclass(frozen=True)
class Sampled:
    """Draws tokens at even steps of the distribution of `||V_j|| A[cls, j]`; few where few carry it.

    Attributes:
        keeps: Points for each eligible token, one a step, rounded up: so many tokens stay at most. Above 1
            there are more points than tokens, and fewer tokens lie between all of them; 1 keeps all.
        min_k: Eligible tokens that stay at least.
    """

    keeps: tuple[float, ...]
    min_k: int = 1

    needs: ClassVar[frozenset[Need]] = frozenset({"attention", "values"})
    exact: ClassVar[bool] = False
    name: ClassVar[str] = "ats"

    def __post_init__(self) -> None:
        if bad := [keep for keep in self.keeps if type(keep) not in (int, float) or not 0 < keep <= MOST]:
            raise InputError(f"keep={list(self.keeps)}: {bad[0]!r} must be in (0, {MOST}]")
        object.__setattr__(self, "keeps", tuple(self.keeps))
        refuse_bad_floor(self.min_k)

    @property
    def steps(self) -> int:
        """Number of steps it has amounts for."""
        return len(self.keeps)

    def idle(self, step: int) -> bool:
        """Whether a step keeps everything whatever comes."""
        return self.keeps[step] == 1

    def most(self, eligible: int, step: int) -> int:
        """Points that are drawn, or the floor."""
        return min(eligible, max(share_of(self.keeps[step], eligible), self.min_k))

    def scores(self, signals: Signals) -> Tensor:
        """Significance before it is scaled to sum to 1, which changes no choice, (...)."""
        return value_attention(signals)

    def chosen(self, scores: Tensor, eligible: Tensor, step: int) -> Tensor:
        """Sampled tokens and the floor, (B, T) bool."""
        k = shares_of(self.keeps[step], eligible.sum(1, keepdim=True)).clamp_min(1)
        most = share_of(self.keeps[step], eligible.shape[1])
        return sampled(scores, eligible, k, max(most, 1)) | top_k(scores, eligible, self.min_k)

    def settings(self) -> dict[str, Any]:
        """What it is built with, as plain values."""
        return {"keeps": list(self.keeps), "min_k": self.min_k}


@dataclass(frozen=True, kw_only=True)
class Ats(TokenMethod):
    """Samples tokens between attention and MLP; the number differs from sample to sample."""

    name: ClassVar[str] = "ats"
    needs_class_token: ClassVar[bool] = True

    def default_layers(self, blocks: int) -> tuple[int, ...]:
        """All from the end of the first quarter on, as published: blocks 4 to 12 of 12."""
        return tuple(range(blocks // 4, blocks))

    def amount(self, part: float) -> float:
        """Points for each token: from none to far more than there are tokens, which leaves ever fewer out."""
        points = round(min(part / (1 - part), MOST), 5) if part < 1 else 1.0
        # as many points as tokens would read as keeping all
        return points if part == 1 or points != 1 else 0.99999

    def rule(self, keeps: tuple[float, ...]) -> Sampled:
        """The rule with these shares."""
        return Sampled(keeps, self.min_k)
