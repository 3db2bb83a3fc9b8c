"""How long a model takes as a function of how many units each group keeps: a table of what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Points = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of one pass: what always stays, plus what each group adds with the units it keeps.

    Attributes:
        rest_ns: Time of everything that no unit group touches.
        groups: Per group ascending pairs of kept units and nanoseconds; it starts at no units with 0.
        batch: Samples of the pass.
        clock: Times models on the same samples; what it is, only who made the table knows.
    """

    rest_ns: int
    groups: Mapping[str, Points]
    batch: int
    clock: Any = field(default=None, compare=False, repr=False)

    def at(self, kept: Mapping[str, int]) -> int:
        """Nanoseconds of a pass when groups keep so many units."""
        return self.rest_ns + sum(self.of(name, kept[name]) for name in self.groups)

    def of(self, group: str, kept: int) -> int:
        """Nanoseconds that a group's kept units add; straight lines between what was measured."""
        points = self.groups[group]
        for (low, below), (high, above) in pairwise(points):
            if low <= kept <= high:
                return below + (above - below) * (kept - low) // (high - low)
        return points[-1][1]

    def per_unit(self, group: str) -> int:
        """Mean nanoseconds of one unit, at least 1; what orders groups, whatever steps a kernel takes."""
        count, whole = self.groups[group][-1]
        return max(1, whole // max(1, count))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rest_ns": self.rest_ns,
            "groups": {n: [*map(list, p)] for n, p in self.groups.items()},
            "batch": self.batch,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], clock: Any = None) -> "LatencyTable":
        """Undo `to_json`."""
        groups = {name: tuple((kept, ns) for kept, ns in points) for name, points in found["groups"].items()}
        return cls(found["rest_ns"], groups, found["batch"], clock)
