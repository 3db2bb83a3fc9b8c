"""Global unstructured pruning: one threshold over all weights of the blocks' linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import MatrixPlan, Plan, Scores
from prune.normalize import Normalization, normalized
from prune.ranking import ranking_key
from prune.rewriting import Applied
from prune.rounds import Schedule
from prune.sensitivity.allocation import removed_counts
from prune.weights.matrices import Matrix, linear_of, prunable_matrices
from prune.weights.method import ONLY_COMPRESSION
from prune.whole import scores as scoring
from prune.whole import threshold
from prune.whole.scores import WeightScore, weight_scores
from prune.whole.threshold import asked_count, lowest, lowest_of_all
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Range, Ratio, Seed, Whole, check_fields
from utils.storage import Artifact, Scratch, Store, folder_name, key_hash

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class GlobalWeights:
    """Zeros wherever a weight's score is lowest in the whole model.

    Candidates are the weights of all linears in the blocks. Embeddings, norms, biases and the
    classifier stay dense, and the report lists them.

    Attributes:
        ratio: Fraction of the candidates to remove: exactly `round(ratio * candidates)` of them.
        score: `magnitude`, `taylor` (`sum_b |w g_b|`), `taylor_signed` (`|w sum_b g_b|`), `fisher`
            (`sum_b (w g_b)^2`), or `random`, the control.
        normalize: How scores of different linears are made comparable.
        allocation: `global` for one threshold; a file that a sensitivity analysis wrote, or
            `sensitivity` to make one: then each linear loses what the curves say.
        min_density: Fraction that every linear keeps at least.
        min_keep: Weights that every linear keeps at least; 0 lets one become empty.
        skip: Patterns of names to leave dense.
        steps: Rounds of pruning and recovery in which the ratio is reached.
        schedule: How the ratio grows over them.
        seed: Of the random score.
    """

    ratio: Annotated[float, Range(0, 1)] = 0.5
    score: WeightScore = "magnitude"
    normalize: Normalization = "none"
    allocation: Literal["global", "sensitivity"] | ExistingPath = "global"
    min_density: Ratio = 0.0
    min_keep: Whole = 1
    skip: tuple[str, ...] = ()
    steps: Count = 1
    schedule: Schedule = "linear"
    seed: Seed = 0

    ranks: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = True
    ranking_code: ClassVar[tuple[ModuleType, ...]] = (scoring, threshold)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "global_weights"

    def ranking_settings(self) -> dict[str, Any]:
        """What the scores depend on; never the ratio."""
        return {"score": self.score, "skip": list(self.skip), "seed": self.seed if self.score == "random" else None}

    def check(self, costs: CostModel) -> None:
        """Linears are looked at in `plan`, which needs no scores."""

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Nothing is kept a unit; see `apply_on`."""
        return Scores({})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Say how much is to go.

        Raises:
            InputError: If the floors do not leave so much.
        """
        matrices = prunable_matrices(model, self.skip)
        total, floors = sum(matrix.size for matrix in matrices), [self.floor(matrix) for matrix in matrices]
        count = asked_count(self.ratio, total)
        if count > total - sum(floors):
            largest = (total - sum(floors)) / total
            raise InputError(
                f"prune.ratio={self.ratio}: {count:,} of {total:,} weights were to go, but with prune.min_keep="
                f"{self.min_keep} and prune.min_density={self.min_density} no linear may become empty or thinner than "
                f"that: at most {total - sum(floors):,} can go (prune.ratio {largest:.6g}); lower it, or set "
                "prune.min_keep=0"
            )
        return Plan((), budget="weights", ratio_asked=self.ratio)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Not possible without data and storage."""
        raise RuntimeError(f"prune={self.name} is applied by apply_on, which takes the calibration data")

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Zero the lowest scores in a copy; scores that look at data come from storage if they are there.

        Raises:
            InputError: If there is no calibration data for a score that needs it.
            RunError: If a score is not finite.
        """
        matrices = prunable_matrices(model, self.skip)
        fetched = self._scores(model, data, store, matrices)
        masks = self.masks(model, matrices, fetched.scores)
        pruned = model.copy()
        with torch.no_grad():
            for name, mask in masks.items():
                weight = linear_of(pruned.network, name).weight
                weight.masked_fill_(mask.to(weight.device), 0)
        return Applied(pruned, self._carried_out(plan, model, matrices, masks), fetched.key, fetched.path, fetched.hit)

    def masks(
        self, model: PrunableModel, matrices: Sequence[Matrix], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What goes from each linear, (O, I), bool.

        Args:
            model: The model as it is; a weight that is zero already goes first.
            matrices: The linears.
            scores: Per linear (O, I).
        """
        flat = normalized({matrix.name: scores[matrix.name].flatten() for matrix in matrices}, self.normalize)
        for matrix in matrices:
            zero = linear_of(model.network, matrix.name).weight.detach().flatten() == 0
            flat[matrix.name] = flat[matrix.name].masked_fill(zero.cpu(), -1.0)
        values = [flat[matrix.name].view(matrix.outputs, matrix.inputs) for matrix in matrices]
        floors = [self.floor(matrix) for matrix in matrices]
        if self.allocation == "global":
            count = asked_count(self.ratio, sum(matrix.size for matrix in matrices))
            found = lowest_of_all(values, count, floors)
        else:
            sizes = {matrix.name: matrix.size for matrix in matrices}
            counts = removed_counts(self.allocation, sizes, self.ratio, dict(zip(sizes, floors, strict=True)))
            found = [lowest(value, counts[m.name]) for value, m in zip(values, matrices, strict=True)]
        return {matrix.name: mask for matrix, mask in zip(matrices, found, strict=True)}

    def floor(self, matrix: Matrix) -> int:
        """Weights that a linear keeps at least."""
        return min(matrix.size, max(self.min_keep, ceil(self.min_density * matrix.size - 1e-9)))

    def _scores(self, model: PrunableModel, data: DataBundle, store: Store, matrices: Sequence[Matrix]) -> "_Fetched":
        if self.score in ("magnitude", "random"):
            return _Fetched(weight_scores(model, data, matrices, self.score, self.seed))

        def compute(scratch: Scratch) -> Artifact:
            return Artifact(weight_scores(model, data, matrices, self.score), {"method": f"weights by {self.score}"})

        key = ranking_key(self, model, data)
        folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
        found = store.fetch(folder, f"weight-{folder_name(self.score)}", key, compute)
        return _Fetched(found.artifact.tensors, key_hash(key), found.path, found.hit)

    def _carried_out(
        self, plan: Plan, model: PrunableModel, matrices: Sequence[Matrix], masks: Mapping[str, Tensor]
    ) -> Plan:
        rows = [MatrixPlan(m.name, m.layer, m.size, int(masks[m.name].sum())) for m in matrices]
        zeros, total = sum(row.zeros for row in rows), sum(row.count for row in rows)
        at_floor = [self.floor(m) and r.zeros == m.size - self.floor(m) for m, r in zip(matrices, rows, strict=True)]
        floored = [matrix.name for matrix, held in zip(matrices, at_floor, strict=True) if held]
        empty = [row.name for row in rows if row.zeros == row.count]
        excluded = left_dense(model.network, [matrix.name for matrix in matrices])
        notes = [ONLY_COMPRESSION, f"Left dense: {'; '.join(excluded)}."]
        notes += [f"Held at their floor, else emptier: {_listed(floored)}."] if floored else []
        notes += [f"Empty: {_listed(empty)} lost every weight (prune.min_keep=0)."] if empty else []
        details = {
            "score": self.score, "normalize": self.normalize, "allocation": Path(self.allocation).name,
            "excluded": excluded, "floored": floored, "empty": empty, "notes": notes,
        }  # fmt: skip
        return replace(plan, ratio_reached=zeros / total, matrices=tuple(rows), details=details)


@dataclass(frozen=True)
class _Fetched:
    scores: Mapping[str, Tensor]
    key: str | None = None
    path: Any = None
    hit: bool = False


def left_dense(network: nn.Module, candidates: Sequence[str]) -> list[str]:
    """Every parameter that is no candidate: vectors of a kind together, anything else by name."""
    chosen = {f"{name}.weight" for name in candidates}
    others = {name: p for name, p in network.named_parameters() if name not in chosen}
    vectors = [name for name, parameter in others.items() if parameter.ndim < 2]
    biases = [name for name in vectors if name.endswith("bias")]
    kinds = {"biases": biases, "norms and scales": [name for name in vectors if name not in biases]}
    return [*(name for name in others if name not in vectors), *(f"{len(n)} {k}" for k, n in kinds.items() if n)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
