"""Global structured pruning: rows of every linear in one ranking; what can be removed is, other rows are masked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.cost import CostModel
from models.positions import positions_per_call
from prune.base import MatrixPlan, Plan, Scores
from prune.gates import calibration_of, gate_gradients, loss_gradients, undisturbed
from prune.normalize import normalized
from prune.rankers.fisher import fisher
from prune.rankers.magnitude import Magnitude
from prune.rankers.taylor import taylor_batch, taylor_signed
from prune.structural import Structural
from prune.weights.matrices import Matrix, linear_of, prunable_matrices
from utils.distributed import divided
from utils.errors import InputError
from utils.hooks import Hook, hooked
from utils.memory import Portions
from utils.progress import progress_bar
from utils.rules import Seed

ROWS = ".rows"
PRICES = "prices"
ONLY_MASKED = (
    "{rows} rows of {linears} linears are masked only: they write zeros into the residual stream, where nothing can be "
    "removed exactly. They save no time or memory; MACs and parameters count what was really removed."
)


@dataclass(frozen=True, kw_only=True)
class GlobalRows(Structural):
    """Heads and neurons, and all other rows of the blocks' linears, in one ranking by score per MAC.

    The budget is met by what is really removed, heads and neurons, and by that alone. Other rows
    (of output projections) that score below the dearest unit that goes are zeroed, bias included.

    Attributes:
        score: `fisher`, `taylor` or `taylor_signed` of the gates, `magnitude` (the L2 norm), or `random`.
        masked_rows: Whether other rows take part at all.
        seed: Of the random score.
    """

    score: Literal["fisher", "taylor", "taylor_signed", "magnitude", "random"] = "fisher"
    masked_rows: bool = True
    seed: Seed = 0

    search_fields = Structural.search_fields | {"masked_rows"}
    ranking_code: ClassVar[tuple[ModuleType, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "width" and self.masked_rows:
            raise InputError(
                "prune.budget=width: has no common threshold; must be macs or params, or masked_rows=false"
            )
        if self.repair and self.masked_rows:
            raise InputError(
                f"prune.repair={list(self.repair)}: would fill rows that were zeroed; must be [], or masked_rows=false"
            )

    @property
    def name(self) -> str:
        """Short name for files and reports."""
        return "global_rows"

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score units and other rows, and note what a row of each linear costs."""
        matrices = other_rows(model)
        runs = positions_per_call(model, data.example)
        prices = {m.name: {"macs": m.inputs * sum(runs.get(m.name, [])), "params": m.inputs} for m in matrices}
        units, rows = self._units(model, data), self._rows(model, data, matrices)
        found = units | {f"{name}{ROWS}": values for name, values in rows.items()}
        return Scores({self.score: found}, {PRICES: prices})

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the best units within the budget, and mask the rows that score below them."""
        plan = super().plan(model, scores, costs)
        if not self.masked_rows:
            return plan
        values = {name: v.double() for name, v in normalized(scores.only(), self.normalize).items()}
        limit = self._dearest(plan, values, costs)
        masked = {}
        for matrix in other_rows(model):
            price = scores.facts[PRICES][matrix.name]["params" if self.budget == "params" else "macs"]
            found = values[f"{matrix.name}{ROWS}"] / (max(1, price) if self.per_cost else 1)
            masked[matrix.name] = self._below(found, limit, model, matrix)
        count = sum(map(len, masked.values()))
        notes = [ONLY_MASKED.format(rows=count, linears=sum(map(bool, masked.values())))] if count else []
        details = {"score": self.score, "masked_rows": masked, "notes": notes}
        pruned = other_sizes(model, plan)
        matrices = tuple(
            MatrixPlan(m.name, m.layer, m.outputs * pruned[m.name], len(masked[m.name]) * pruned[m.name])
            for m in other_rows(model) if masked[m.name]
        )  # fmt: skip
        return replace(plan, details={**plan.details, **details}, matrices=matrices)

    def apply(self, model: PrunableModel, plan: Plan) -> PrunableModel:
        """Slice units away, in a copy, and zero the masked rows."""
        pruned = super().apply(model, plan)
        for name, rows in plan.details.get("masked_rows", {}).items():
            linear = linear_of(pruned.network, name)
            with torch.no_grad():
                linear.weight[rows] = 0
                if linear.bias is not None:
                    linear.bias[rows] = 0
        return pruned

    def _dearest(self, plan: Plan, values: Mapping[str, Tensor], costs: CostModel) -> float:
        """The highest score per cost among the units that go; minus infinity if none does."""
        found = [-torch.inf]
        for group in plan.groups:
            gone = [unit for unit in range(group.count) if unit not in set(group.kept)]
            one, none = ({**costs.counts, group.name: units} for units in (1, 0))
            quantity = "params" if self.budget == "params" else "macs"
            price = max(1, costs.total(quantity, one) - costs.total(quantity, none)) if self.per_cost else 1
            found += [float(values[group.name][gone].max()) / price] if gone else []
        return max(found)

    def _below(self, values: Tensor, limit: float, model: PrunableModel, matrix: Matrix) -> list[int]:
        """Rows below a limit, as many as the floor allows, the lowest first; those zero already stay so."""
        zero = linear_of(model.network, matrix.name).weight.detach().cpu().eq(0).all(dim=1)
        values = values.masked_fill(zero, -torch.inf)
        order = values.argsort(stable=True)[: max(0, len(values) - self.min_keep)]
        return sorted(int(row) for row in order if values[row] < limit or zero[row])

    def _units(self, model: PrunableModel, data: DataBundle) -> dict[str, Tensor]:
        if self.score == "magnitude":
            return dict(Magnitude().rank(model, data).only())
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {group.name: torch.rand(group.count, generator=generator) for group in model.unit_groups()}
        return {name: self._of(values) for name, values in gate_gradients(model, data, "units").items()}

    def _rows(self, model: PrunableModel, data: DataBundle, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        if self.score == "magnitude":
            return {m.name: row_norms(linear_of(model.network, m.name)) for m in matrices}
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed + 1)
            return {matrix.name: torch.rand(matrix.outputs, generator=generator) for matrix in matrices}
        return {name: self._of(values) for name, values in row_gradients(model, data, matrices).items()}

    def _of(self, gradients: Tensor) -> Tensor:
        rules = {"fisher": fisher, "taylor": taylor_batch, "taylor_signed": taylor_signed}
        return rules[self.score](gradients)


def other_rows(model: PrunableModel) -> tuple[Matrix, ...]:
    """Linears in the blocks whose rows no unit owns: what they write can't be removed, only zeroed."""
    owned = {part.tensor for group in model.unit_groups() for part in group.producers}
    try:
        return tuple(m for m in prunable_matrices(model) if f"{m.name}.weight" not in owned)
    except InputError:  # convolutions alone: units are all there is
        return ()


def other_sizes(model: PrunableModel, plan: Plan) -> dict[str, int]:
    """Inputs that each of these linears has once the plan's units have gone."""
    kept = {group.name: len(group.kept) for group in plan.groups}
    found = {matrix.name: matrix.inputs for matrix in other_rows(model)}
    for group in model.unit_groups():
        if group.consumer.module in found:
            found[group.consumer.module] -= (group.count - kept[group.name]) * group.consumer.index.shape[1]
    return found


def row_norms(linear: nn.Linear) -> Tensor:
    """L2 norm of each row with its bias, (O,), float32, CPU."""
    squares = linear.weight.detach().float().square().sum(dim=1)
    if linear.bias is not None:
        squares = squares + linear.bias.detach().float().square()
    return squares.sqrt().cpu()


def row_gradients(model: PrunableModel, data: DataBundle, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    """Gradient of each calibration batch's mean loss with respect to a gate on every row's output, at one.

    A gate on an output is one on weight and bias: `sum_i w_ji g_ji + b_j g_bj`.

    Returns:
        Per linear (batches, O), float32, CPU.
    """
    batches = calibration_of(data).calibration
    if not matrices:
        return {}
    gates = {
        m.name: torch.ones(m.outputs, device=model.device, dtype=model.dtype, requires_grad=True) for m in matrices
    }
    hooks: list[Hook] = [(linear_of(model.network, name), _gating(gate)) for name, gate in gates.items()]
    portions = Portions("rows")
    with undisturbed(model.network), hooked(after=hooks), progress_bar("rows", len(batches)) as advance:

        def gradients(batch: Batch) -> tuple[dict[str, Tensor], None]:
            values = loss_gradients(model, data.task, batch, list(gates.values()), portions)
            advance("")
            return dict(zip(gates, values, strict=True)), None

        found = [tensors for tensors, _ in divided(batches, gradients)]
    return {name: torch.stack([tensors[name] for tensors in found]).float().cpu() for name in gates}


def _gating(gate: Tensor) -> Callable[..., Any]:
    return partial(_gated, gate)


def _gated(gate: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * gate
