"""The nouns of pruning: scores, the plan made from them, and what every method can do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.checkpoint import reduction_of
from models.cost import CostModel
from models.keeping import Keeping
from models.merging import Reduction
from utils.errors import RunError
from utils.files import write_atomically


@dataclass(frozen=True)
class Scores:
    """How much each unit matters; higher means keep.

    Attributes:
        terms: Per term (a method with several keeps them apart) and unit group a float32
            CPU tensor, (count,).
        facts: What else a method needs to know of them at search time, as plain values.
    """

    terms: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any] = field(default_factory=dict)

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
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> "Scores":
        """Undo `to_tensors`."""
        terms: dict[str, dict[str, Tensor]] = {}
        for name, values in tensors.items():
            term, _, group = name.partition("/")
            terms.setdefault(term, {})[group] = values
        return cls(terms, facts or {})


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
class MatrixPlan:
    """How many weights of a matrix become zero.

    Attributes:
        name: Dotted name of its linear.
        layer: Position of its block, from 0.
        count: Its weights.
        zeros: Those that become zero.
    """

    name: str
    layer: int
    count: int
    zeros: int


@dataclass(frozen=True)
class BlockPlan:
    """Which of a model's blocks stay.

    Attributes:
        kept: Their positions, ascending.
        count: Blocks that the model has.
    """

    kept: tuple[int, ...]
    count: int

    @property
    def removed(self) -> tuple[int, ...]:
        """Positions of those that go, ascending."""
        return tuple(position for position in range(self.count) if position not in self.kept)


@dataclass(frozen=True)
class Plan:
    """What a pruned model keeps. A full plan is the identity.

    Attributes:
        groups: One entry per unit group, in the model's order.
        budget: The quantity that the ratios refer to, or None for a plan without one.
        ratio_asked: Fraction of it that was to be removed.
        ratio_reached: Fraction that the kept units and the merged tokens remove.
        tokens: How tokens are merged or dropped on their way; None leaves their flow as it is.
        token_counts: Tokens that then enter the attention and the MLP of each block; their mean
            over the calibration samples where it differs from sample to sample.
        matrices: One entry per weight matrix in which weights become zero.
        details: What else a method has to say of it, as plain values.
        blocks: Which blocks stay, whatever units of the others are listed; None leaves all.
    """

    groups: tuple[GroupPlan, ...]
    budget: str | None = None
    ratio_asked: float = 0.0
    ratio_reached: float = 0.0
    tokens: Reduction | Keeping | None = None
    token_counts: tuple[tuple[float, float], ...] = ()
    matrices: tuple[MatrixPlan, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    blocks: BlockPlan | None = None

    def __post_init__(self) -> None:
        if len(self.token_counts) != (self.tokens.blocks if self.tokens else 0):
            raise ValueError(f"token_counts has {len(self.token_counts)} entries; it must have one a block of tokens")

    @property
    def kept(self) -> dict[str, Tensor]:
        """Kept unit indices per group name, int64."""
        return {group.name: torch.tensor(group.kept, dtype=torch.int64) for group in self.groups}

    @property
    def keeps_all_units(self) -> bool:
        """Whether no unit goes."""
        return all(len(group.kept) == group.count for group in self.groups)

    @property
    def is_identity(self) -> bool:
        """Whether nothing goes: no unit, no block, no token, no weight, and nothing that is computed for no answer."""
        in_front = isinstance(self.tokens, Reduction) and self.tokens.front_only
        others = (in_front, self.tokens and self.tokens.merges, self.blocks and self.blocks.removed)
        return self.keeps_all_units and not any(others) and not any(matrix.zeros for matrix in self.matrices)

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
            **self._token_summary(),
            **({"blocks": {"kept": list(self.blocks.kept), "count": self.blocks.count}} if self.blocks else {}),
            **({"matrices": [asdict(matrix) for matrix in self.matrices]} if self.matrices else {}),
            **({"details": dict(self.details)} if self.details else {}),
        }

    def _token_summary(self) -> dict[str, Any]:
        if self.tokens is None:
            return {"tokens": None}
        if isinstance(self.tokens, Keeping):
            halves = [{"layer": i, "attention": n, "mlp": m} for i, (n, m) in enumerate(self.token_counts)]
            return {"tokens": halves, "token_reduction": self.tokens.to_json()}
        rows = [
            {"layer": layer, "merged": merged, "attention": attention, "mlp": mlp}
            for layer, (merged, (attention, mlp)) in enumerate(zip(self.tokens.merged, self.token_counts, strict=True))
        ]
        settings = self.tokens.to_json()
        del settings["merged"]
        return {"tokens": rows, "token_reduction": settings}

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
        rows = found["tokens"]
        tokens = _tokens_of(rows, found["token_reduction"]) if rows is not None else None
        counts = tuple((r["attention"], r["mlp"]) for r in rows or ())
        ratios = (found["ratio_asked"], found["ratio_reached"])
        matrices = tuple(MatrixPlan(**row) for row in found.get("matrices", ()))
        row = found.get("blocks")
        blocks = BlockPlan(tuple(row["kept"]), row["count"]) if row else None
        return cls(tuple(groups), found["budget"], *ratios, tokens, counts, matrices, found.get("details", {}), blocks)

    @classmethod
    def of(cls, model: PrunableModel, kept: Mapping[str, Tensor], **others: Any) -> "Plan":
        """Make a plan for a model; groups that `kept` does not name stay whole.

        `others` are the plan's other fields.
        """
        everything = {g.name: torch.arange(g.count) for g in model.unit_groups()}
        if unknown := kept.keys() - everything.keys():
            raise ValueError(f"kept names {sorted(unknown)}; the model's groups are {', '.join(everything)}")
        units = {name: tuple((kept.get(name, whole)).tolist()) for name, whole in everything.items()}
        groups = (GroupPlan(g.name, g.kind, g.layer, g.count, units[g.name]) for g in model.unit_groups())
        return cls(tuple(groups), **others)


def _tokens_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Reduction | Keeping:
    merged = {} if "rule" in settings else {"merged": [row["merged"] for row in rows]}
    return reduction_of({**settings, **merged})


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
