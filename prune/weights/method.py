"""What all methods of weight sparsity share: settings, the plan, and the cache."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import MatrixPlan, Plan, Scores
from prune.optin.precision import Precision
from prune.ranking import ranking_key
from prune.rewriting import Applied
from prune.sensitivity.allocation import content_of
from prune.weights import (
    abreast,
    allocation,
    allotting,
    masks,
    matrices,
    products,
    sequential,
    statistics,
    walk,
    words,
)
from prune.weights.masks import UNSTRUCTURED, Pattern, Share, grouped_mask, pattern_mask, pattern_of, removed_in
from prune.weights.matrices import Matrix, Solved, prunable_matrices
from prune.weights.sequential import block_files, rewritten, written
from prune.weights.statistics import Statistic
from utils.errors import InputError, RunError
from utils.rules import ExistingPath, NonNegative, Positive, Range, check_fields
from utils.storage import Store, folder_name, key_hash

Allocation = Literal["uniform", "global", "owl", "alpha", "sensitivity"] | ExistingPath
Schedule = Literal["block_sequential", "true_sequential", "one_forward", "dense"]
Competing = Literal["tensor", "row", "column", "global"]
# here, since the class has a field of the name of the first
CODE = (abreast, allocation, allotting, masks, matrices, products, sequential, statistics, walk, words)
ONLY_COMPRESSION = (
    "Weight sparsity is compression only: zeros take as much time and memory as other weights "
    "wherever no sparse kernel is used, and none is used here."
)


@dataclass(frozen=True, kw_only=True)
class WeightSparsity(ABC):
    """Zeros in the linears inside a model's blocks; a method adds how weights are chosen.

    Attributes:
        ratio: Fraction of those weights to remove.
        pattern: `unstructured`, or `n:m`: n zeros in every m inputs of a row, with ratio n / m.
        group: What competes: the whole `tensor`, a `row` (an output), a `column` (an input), or
            all tensors together (`global`); None takes the method's own.
        allocation: How much each matrix loses: the same (`uniform`), what falls below one threshold
            (`global`), by block from outliers (`owl`) or spectra (`alpha`), or by the curves of a sensitivity
            analysis: a file, or `sensitivity` to make one.
        schedule: Which model statistics come from: all blocks before pruned already
            (`block_sequential`), and also all linears before in the same block (`true_sequential`,
            or `one_forward`, the same in one pass that holds more memory), or the `dense` model.
        skip: Patterns of names to leave dense.
        offload: Keep only the current block on the device.
        precision: What matrix products are computed in on passes that take statistics alone; statistics are summed,
            and what the next block reads is computed, in float32.
        owl_multiple: A score above so many times the mean is an outlier.
        owl_spread: Largest deviation of a block's density.
        alpha_epsilon: Largest relative deviation of a block's sparsity.
    """

    ratio: Annotated[float, Range(0, 1)] = 0.5
    pattern: str = UNSTRUCTURED
    group: Competing | None = None
    allocation: Allocation = "uniform"
    schedule: Schedule = "block_sequential"
    skip: tuple[str, ...] = ()
    offload: bool = False
    precision: Precision = "float32"
    owl_multiple: Positive = 5.0
    owl_spread: NonNegative = 0.08
    alpha_epsilon: Annotated[float, Range(0, 1)] = 0.3

    own_group: ClassVar[masks.Group | None]
    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = CODE

    def __post_init__(self) -> None:
        check_fields(self)
        if pattern_of(self.pattern, self.ratio) is not None:
            if self.group is not None:
                raise InputError(f"prune.group={self.group}: must be null with prune.pattern={self.pattern}")
            if self.allocation != "uniform":
                raise InputError(
                    f"prune.allocation={self.allocation}: must be uniform with prune.pattern={self.pattern}"
                )
        if self.precision != "float32" and self.schedule in ("one_forward", "dense"):
            raise InputError(
                f"prune.precision={self.precision}: must be float32 with prune.schedule={self.schedule}, "
                "where no pass takes statistics alone"
            )
        if self.group == "global" and self.allocation not in ("uniform", "global"):
            raise InputError(f"prune.allocation={self.allocation}: must be uniform or global with prune.group=global")

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for files and reports."""

    @abstractmethod
    def statistic(self) -> Statistic:
        """Start what is to be known of an input."""

    @abstractmethod
    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """How much each weight matters, (O, I), float32, not negative; what allocations look at."""

    @abstractmethod
    def solve(self, weights: Sequence[Tensor], statistic: Statistic | None, shares: Sequence[Share]) -> list[Solved]:
        """Choose what goes from each of the linears that read one input."""

    def ranking_settings(self) -> dict[str, Any]:
        """All settings that weights depend on."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "offload"}
        return found | {"skip": list(self.skip), "allocation": content_of(self.allocation)}

    def check(self, costs: CostModel) -> None:  # noqa: B027
        """Settings were checked as they were given; matrices are in `plan`."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """There is nothing to rank ahead."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Say how much is to go; refuses matrices that the pattern does not fit."""
        for matrix in prunable_matrices(model, self.skip):
            if self.chosen is not None:
                self.chosen.refuse_misfit(matrix.name, matrix.inputs)
        return Plan((), budget="weights", ratio_asked=self.ratio)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Not possible without data and storage."""
        raise RuntimeError(f"prune={self.name} is applied by apply_on, which takes the calibration data")

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Rewrite a copy's weights, or fetch them if that was done before.

        Raises:
            InputError: If there is no calibration data, or a linear does not run exactly once.
            RunError: If a score is not finite, or a Gram matrix can't be factored.
        """
        key = self.key(model, data)
        folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
        found = store.fetch(folder, self.name, key, lambda scratch: rewritten(self, model, data, scratch))
        for path in block_files(found.path):
            path.unlink(missing_ok=True)
        pruned = written(model, found.artifact.tensors)
        plan = self._carried_out(plan, model, found.artifact.facts)
        return Applied(pruned, plan, key_hash(key), found.path, found.hit)

    def key(self, model: PrunableModel, data: DataBundle) -> dict[str, Any]:
        """Everything that the rewritten weights depend on."""
        return {**ranking_key(self, model, data), "torch": torch.__version__, "device": model.device.type}

    @property
    def chosen(self) -> Pattern | None:
        """The pattern, or None."""
        return pattern_of(self.pattern, self.ratio)

    @property
    def competing(self) -> masks.Group | None:
        """What competes inside one matrix; None for a method with a rule of its own."""
        return "tensor" if self.group == "global" else self.group or self.own_group

    @property
    def allotting(self) -> Allocation:
        """How matrices are told apart: one threshold for all is that of `global`."""
        return "global" if self.group == "global" else self.allocation

    def mask(self, scores: Tensor, share: Share) -> Tensor:
        """What goes by these scores, (O, I), bool."""
        if self.chosen is not None:
            return pattern_mask(scores, self.chosen)
        return grouped_mask(scores, share, self.competing or "tensor")

    def expected(self, matrix: Matrix, share: Share) -> int | None:
        """Exactly how many weights of a matrix must go; None where that is not known ahead."""
        if self.chosen is not None:
            return int(matrix.size * self.chosen.share)
        groups = {"row": matrix.outputs, "column": matrix.inputs}.get(self.competing or "tensor", 1)
        return removed_in(share, groups, matrix.size // groups)

    def check_reached(self, matrix: Matrix, share: Share, removed: int) -> None:
        """Raise a RunError if a matrix did not lose what it had to."""
        wanted = self.expected(matrix, share)
        if wanted is not None and removed != wanted:
            raise RunError(f"{matrix.name}: {removed} of {matrix.size} weights were removed; must be {wanted}")

    def _carried_out(self, plan: Plan, model: PrunableModel, facts: Mapping[str, Any]) -> Plan:
        rows = [
            MatrixPlan(m.name, m.layer, m.size, facts["matrices"][m.name]["removed"])
            for m in prunable_matrices(model, self.skip)
        ]
        reached = sum(row.zeros for row in rows) / sum(row.count for row in rows)
        details = {
            "pattern": self.pattern,
            "group": "global" if self.group == "global" else self.competing,
            "allocation": self.allotting,
            "schedule": self.schedule if self.looks_at_data else None,
            **facts,
            "notes": [ONLY_COMPRESSION, *self.notes_on(facts)],
        }
        return replace(plan, ratio_reached=reached, matrices=tuple(rows), details=details)

    def notes_on(self, facts: Mapping[str, Any]) -> list[str]:
        """What a reader should know of how it went."""
        if not self.looks_at_data:
            return []
        other, coarse = self.schedule != "block_sequential", self.precision != "float32"
        schedule = [f"Statistics by schedule={self.schedule}, not block by block as published."] if other else []
        precision = f"Passes that take statistics alone computed their products in {self.precision}."
        return [*schedule, *([precision] if coarse else [])]
