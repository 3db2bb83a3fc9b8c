"""The nouns of pruning: scores, the plan made from them, and what every method can do."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from utils.errors import RunError
from utils.files import write_atomically


@dataclass(frozen=True)
class Scores:
    """How much each unit matters; higher means keep.

    Attributes:
        terms: Per term (a method with several keeps them apart) and unit group a float32
            CPU tensor, (count,).
    """

    terms: Mapping[str, Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        for term, groups in self.terms.items():
            for group, values in groups.items():
                _refuse_non_finite(term, group, values)

    def only(self) -> Mapping[str, Tensor]:
        """The scores per group of a method with a single term."""
        (term,) = self.terms.values()
        return term

    def to_tensors(self) -> dict[str, Tensor]:
        """Flatten to names that a safetensors file can hold."""
        return {f"{t}/{g}": values for t, groups in self.terms.items() for g, values in groups.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Scores":
        """Undo `to_tensors`."""
        terms: dict[str, dict[str, Tensor]] = {}
        for name, values in tensors.items():
            term, _, group = name.partition("/")
            terms.setdefault(term, {})[group] = values
        return cls(terms)


def _refuse_non_finite(term: str, group: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        raise RunError(
            f"scores of {group} ({term}): {len(bad)} of {len(values)} are NaN or infinite, the first is "
            f"unit {int(bad[0])}; every score must be finite"
        )


@dataclass(frozen=True)
class GroupPlan:
    """Which of a group's units stay."""

    name: str
    kind: str
    layer: int
    count: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a pruned model keeps. A full plan is the identity.

    Attributes:
        groups: One entry per unit group, in the model's order.
        budget: The quantity that the ratios refer to, or None for a plan without one.
        ratio_asked: Fraction of it that was to be removed.
        ratio_reached: Fraction that the kept units remove.
    """

    groups: tuple[GroupPlan, ...]
    budget: str | None = None
    ratio_asked: float = 0.0
    ratio_reached: float = 0.0

    @property
    def kept(self) -> dict[str, Tensor]:
        """Kept unit indices per group name, int64."""
        return {group.name: torch.tensor(group.kept, dtype=torch.int64) for group in self.groups}

    @property
    def is_identity(self) -> bool:
        """Whether nothing goes."""
        return all(len(group.kept) == group.count for group in self.groups)

    def summary(self) -> dict[str, Any]:
        """The plan as a record shows it: numbers of units, not their indices."""
        groups = [
            {"name": g.name, "kind": g.kind, "layer": g.layer, "kept": len(g.kept), "count": g.count}
            for g in self.groups
        ]
        return {
            "budget": self.budget,
            "ratio_asked": self.ratio_asked,
            "ratio_reached": self.ratio_reached,
            "groups": groups,
            "tokens": None,
        }

    def save(self, path: Path) -> None:
        """Write the plan, with every kept index, as JSON."""
        summary = self.summary()
        for row, group in zip(summary["groups"], self.groups, strict=True):
            row["kept_units"] = list(group.kept)
        write_atomically(path, json.dumps(summary, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan that `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        groups = (
            GroupPlan(r["name"], r["kind"], r["layer"], r["count"], tuple(r["kept_units"])) for r in found["groups"]
        )
        return cls(tuple(groups), found["budget"], found["ratio_asked"], found["ratio_reached"])

    @classmethod
    def of(cls, model: PrunableModel, kept: Mapping[str, Tensor], **ratios: Any) -> "Plan":
        """Make a plan for a model; groups that `kept` does not name stay whole."""
        everything = {g.name: torch.arange(g.count) for g in model.unit_groups()}
        if unknown := kept.keys() - everything.keys():
            raise ValueError(f"kept names {sorted(unknown)}; the model's groups are {', '.join(everything)}")
        units = {name: tuple((kept.get(name, whole)).tolist()) for name, whole in everything.items()}
        groups = (GroupPlan(g.name, g.kind, g.layer, g.count, units[g.name]) for g in model.unit_groups())
        return cls(tuple(groups), **ratios)


class Method(Protocol):
    """A pruning method: it ranks, plans, and applies the plan to a copy of the model.

    Attributes:
        ranks: Whether the method needs scores at all.
        looks_at_data: Whether the scores depend on the calibration data.
    """

    ranks: ClassVar[bool]
    looks_at_data: ClassVar[bool]

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        ...

    def check(self, costs: CostModel) -> None:
        """Refuse, before any work, what can't be reached (InputError)."""
        ...

    def ranking_settings(self) -> dict[str, Any]:
        """The settings that scores depend on, as plain values; never the ratio."""
        ...

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score the dense model's units."""
        ...

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Choose what stays within the budget."""
        ...

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Return a pruned copy; the model stays as it was."""
        ...
