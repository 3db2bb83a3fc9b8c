"""Sensitivity analysis as a method: measure every layer's curve, and cut where the curves say it costs least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.cost import CostModel, cost_model
from prune.base import Plan, Scores
from prune.gates import calibration_of, gate_gradients
from prune.rankers.fisher import fisher
from prune.rankers.magnitude import Magnitude
from prune.rankers.random import Random
from prune.rankers.taylor import Taylor, taylor_batch
from prune.repair.batches import at_most, largest
from prune.rewriting import Applied
from prune.sensitivity import passes
from prune.sensitivity import sweep as sweeping
from prune.sensitivity.allocation import allotted
from prune.sensitivity.checks import cross_effect, curves_of, validated
from prune.sensitivity.sweep import Row, ablation_trials, plain, swept, unit_trials, weight_trials
from prune.structural import Structural
from prune.weights.matrices import Matrix, prunable_matrices
from prune.whole import scores as weight_scoring
from prune.whole.scores import WeightScore, weight_scores
from utils.errors import InputError
from utils.memory import restarted
from utils.rules import Count, Range, Seed
from utils.storage import Scratch, Store

Part = Literal["units", "weights"]
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ABLATION = "ablation"


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Structural):
    """Removes a part of one layer after the other and measures what that does, on calibration samples alone.

    Attributes:
        score: Which units or weights of a layer go first.
        sweep: What is swept: the `units` (heads, neurons, channels), the `weights` of each linear, or both.
        grid: Fractions of a layer that are removed.
        samples: Calibration samples to measure on at most; None takes all.
        ablate: Also remove each unit, or small random sets of many, by itself, to see what scores predict.
        bins: Sets that a large group is divided into for that.
        seed: Of the random control.
    """

    score: Literal["fisher", "taylor", "taylor_signed", "taylor_abs", "magnitude", "random"] = "fisher"
    sweep: tuple[Part, ...] = ("units", "weights")
    grid: tuple[Annotated[float, Range(0, 1, open_low=True, open_high=True)], ...] = GRID
    samples: Count | None = None
    ablate: bool = True
    bins: Count = 8
    seed: Seed = 0

    ranking_code: ClassVar[tuple[ModuleType, ...]] = (sweeping, passes, weight_scoring)

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.grid) != sorted(set(self.grid)) or not self.grid:
            raise InputError(f"prune.grid={list(self.grid)}: must ascend, with one entry at least")
        if not self.sweep:
            raise InputError("prune.sweep=[]: must name units, weights or both")
        if self.allocation is not None:
            raise InputError(f"prune.allocation={self.allocation}: must be null; this method makes one itself")

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Measure everything; see `rank_on`."""
        return self.rank_on(model, data, None)

    def rank_on(self, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Score the units, then measure every layer at every ratio, gone on with at the last finished row.

        Returns:
            The units' scores; the measured rows are among the facts.

        Raises:
            InputError: If there is no calibration data, or nothing to sweep.
        """
        batches = taken(calibration_of(data).calibration, self.samples)
        left = scratch.load() if scratch is not None else None
        found = Scores.from_tensors(left.tensors).terms if left else unit_scores(model, data, self.seed, self._own)
        own, costs = found[self.score], cost_model(model, data.example)
        groups = [group for group in model.unit_groups() if group.count and self._units]
        trials = [trial for g in groups for trial in unit_trials(model, g, own[g.name], self.grid, costs)]
        trials += self._weight_trials(model, data)
        swept_rows = len(trials)
        if self.ablate:
            trials += [
                t for g in groups
                for t in ablation_trials(model, g, {n: values[g.name] for n, values in found.items()}, self.bins)
            ]  # fmt: skip
        if not trials:
            raise InputError(f"prune.sweep={list(self.sweep)}: model={model.name} has nothing of the kind to remove")
        kept = Scores(found).to_tensors()
        dense, rows = restarted(
            "sensitivity", largest(batches),
            lambda size: swept(model, data, at_most(batches, size), trials, scratch, kept),
        )  # fmt: skip
        facts = {
            "rows": rows[:swept_rows], ABLATION: rows[swept_rows:], "dense": plain(dense),
            "samples": sum(len(next(iter(batch.values()))) for batch in batches), "score": self.score,
        }  # fmt: skip
        return Scores(found, facts)

    def combine(self, model: PrunableModel, scores: Scores) -> Mapping[str, Tensor]:
        """The units' own scores; `plan` prices them by the curves."""
        return scores.terms[self.score]

    def select(self, scores: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        """Not used: the curves are needed."""
        raise RuntimeError("prune=sensitivity plans by its curves")

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the units whose removal would raise the sum of the layers' losses most.

        Raises:
            InputError: If no units were swept, or the budget can't be reached.
        """
        from prune.budget import ratio_of
        from prune.search import select_units

        rows: list[Row] = scores.facts["rows"]
        found = curves_of(rows)
        own = self.combine(model, scores)
        if self._units:
            units = {name: own[name] for name in costs.counts}
            kept = select_units(allotted(found, units), costs, self._budget)
        else:
            kept = {name: torch.arange(count) for name, count in costs.counts.items()}
        reached = ratio_of(costs, self._budget, {name: len(index) for name, index in kept.items()})
        details = {
            "sensitivity": {
                "score": self.score, "samples": scores.facts["samples"], "dense": scores.facts["dense"], "rows": rows,
                "validation": validated(scores.facts[ABLATION]), "model": model.fingerprint(),
            }
        }  # fmt: skip
        return Plan.of(
            model, kept, budget=self.budget, ratio_asked=self.ratio if self._units else 0.0, ratio_reached=reached,
            details=details,
        )  # fmt: skip

    def apply_on(self, model: PrunableModel, plan: Plan, data: DataBundle, store: Store) -> Applied:
        """Cut a copy, and hold the sum of the layers' losses against that of the whole cut."""
        batches = taken(calibration_of(data).calibration, self.samples)
        effect = restarted(
            "sensitivity", largest(batches), lambda size: cross_effect(model, data, at_most(batches, size), plan)
        )
        measured = {**plan.details["sensitivity"], "cross_effect": effect}
        return Applied(self.apply(model, plan), replace(plan, details={**plan.details, "sensitivity": measured}))

    @property
    def _units(self) -> bool:
        return "units" in self.sweep

    @property
    def _own(self) -> str:
        return self.score

    def _weight_trials(self, model: PrunableModel, data: DataBundle) -> list[Any]:
        if "weights" not in self.sweep:
            return []
        matrices = _linears(model)
        names: dict[str, WeightScore] = {"taylor_abs": "taylor"}
        found = weight_scores(model, data, matrices, names.get(self.score, self.score), self.seed)  # type: ignore[arg-type]
        return [trial for m in matrices for trial in weight_trials(model, m, found[m.name], self.grid)]


def _linears(model: PrunableModel) -> tuple[Matrix, ...]:
    try:
        return prunable_matrices(model)
    except InputError:  # a model of convolutions has none, and is swept over its channels alone
        return ()


def unit_scores(model: PrunableModel, data: DataBundle, seed: int, own: str) -> dict[str, dict[str, Tensor]]:
    """Scores of all units by every ranker that an ablation is held against, and the one that was asked for."""
    gradients = gate_gradients(model, data, "unit scores")
    found = {
        "fisher": {name: fisher(values) for name, values in gradients.items()},
        "taylor": {name: taylor_batch(values) for name, values in gradients.items()},
        "magnitude": dict(Magnitude().rank(model, data).only()),
        "random": dict(Random(seed=seed).rank(model, data).only()),
    }
    if own in ("taylor_signed", "taylor_abs"):
        variant: Literal["signed", "abs"] = "signed" if own == "taylor_signed" else "abs"
        found[own] = dict(Taylor(variant=variant).rank(model, data).only())
    return found


def taken(batches: Sequence[Batch], samples: int | None) -> list[Batch]:
    """The first so many samples, in their batches."""
    found, left = [], samples if samples is not None else float("inf")
    for batch in batches:
        size = min(len(next(iter(batch.values()))), left)
        if size > 0:
            found.append({name: tensor[: int(size)] for name, tensor in batch.items()})
            left -= size
    return found
