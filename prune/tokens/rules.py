"""The two ways to choose by scores that methods share: the best share of each sample, and fixed thresholds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, ClassVar

from torch import Tensor

from models.keeping import Need, Signals
from prune.tokens.selection import above, share_of, shares_of, top_k
from utils.errors import InputError


@dataclass(frozen=True)
class BestShare(ABC):
    """Keeps the highest scores of each sample; a method adds `scores`.

    Attributes:
        keeps: Share of the eligible tokens that stays, one a step, rounded up.
        min_k: Eligible tokens that stay at least.
    """

    keeps: tuple[float, ...]
    min_k: int = 1

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps", checked_keeps(self.keeps))
        refuse_bad_floor(self.min_k)

    @abstractmethod
    def scores(self, signals: Signals) -> Tensor:
        """Higher means keep, (...), float32."""

    @property
    def steps(self) -> int:
        """Number of steps it has amounts for."""
        return len(self.keeps)

    def idle(self, step: int) -> bool:
        """Whether a step keeps everything whatever comes."""
        return self.keeps[step] >= 1

    def most(self, eligible: int, step: int) -> int:
        """How many of so many eligible tokens stay."""
        return min(eligible, max(share_of(self.keeps[step], eligible), self.min_k))

    def chosen(self, scores: Tensor, eligible: Tensor, step: int) -> Tensor:
        """The best of each sample, (B, T) bool."""
        k = shares_of(self.keeps[step], eligible.sum(1, keepdim=True)).clamp_min(self.min_k)
        return top_k(scores, eligible, k)

    def settings(self) -> dict[str, Any]:
        """What it is built with, as plain values."""
        return {"keeps": list(self.keeps), "min_k": self.min_k}


@dataclass(frozen=True)
class Above(ABC):
    """Keeps what lies above a constant; a method adds `scores`.

    Attributes:
        thresholds: One a step; minus infinity keeps all.
        min_k: Eligible tokens that stay at least, the highest ones.
    """

    thresholds: tuple[float, ...]
    min_k: int = 1

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    exact: ClassVar[bool] = False
    strict: ClassVar[bool] = True

    def __post_init__(self) -> None:
        found = tuple(float(threshold) for threshold in self.thresholds)
        if any(map(isnan, found)):
            raise InputError(f"thresholds={list(found)}: must be numbers, not NaN")
        object.__setattr__(self, "thresholds", found)
        refuse_bad_floor(self.min_k)

    @abstractmethod
    def scores(self, signals: Signals) -> Tensor:
        """Higher means keep, (...), float32."""

    @property
    def steps(self) -> int:
        """Number of steps it has amounts for."""
        return len(self.thresholds)

    def idle(self, step: int) -> bool:
        """Whether a step keeps everything whatever comes."""
        return self.thresholds[step] == -float("inf")

    def most(self, eligible: int, step: int) -> int:
        """All of them may stay."""
        return eligible

    def chosen(self, scores: Tensor, eligible: Tensor, step: int) -> Tensor:
        """What lies above the constant, and the floor, (B, T) bool."""
        return above(scores, eligible, self.thresholds[step], self.strict, self.min_k)

    def settings(self) -> dict[str, Any]:
        """What it is built with, as plain values; JSON knows no infinity."""
        plain = [t if abs(t) != float("inf") else str(t) for t in self.thresholds]
        return {"thresholds": plain, "min_k": self.min_k}


def checked_keeps(keeps: Sequence[float]) -> tuple[float, ...]:
    """Shares as a tuple; refuses those outside (0, 1] with an InputError."""
    if bad := [keep for keep in keeps if type(keep) not in (int, float) or not 0 < keep <= 1]:
        raise InputError(f"keep={list(keeps)}: {bad[0]!r} must be in (0, 1]")
    return tuple(keeps)


def refuse_bad_floor(min_k: object) -> None:
    """Raise an InputError if a floor is no whole number of at least 1."""
    if type(min_k) is not int or min_k < 1:
        raise InputError(f"min_k={min_k!r}: must be a whole number of at least 1")
