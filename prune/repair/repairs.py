"""Repairing a cut model on calibration data: the order of things, and what is kept of them in storage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import prune.gates
from data.base import DataBundle, fingerprint_of
from models import slicing
from models.base import Batch, PrunableModel
from models.biases import add_biases
from models.keeping import Keeping
from models.merging import Reduction
from prune.base import Plan
from prune.gates import calibration_of, undisturbed
from prune.repair import batches, bias, gates, normal, rebuild, refit, rows, solvers, streams
from prune.repair.batches import at_most, largest, merged
from prune.repair.bias import compensated
from prune.repair.rebuild import Pair, Solver, rebuilt
from prune.repair.solvers import GateTuning, Refit
from prune.surgery import cut
from prune.weights import statistics
from utils.code import code_hash
from utils.errors import InputError
from utils.hooks import hooked
from utils.memory import restarted
from utils.storage import Artifact, Fetched, Scratch, Store, folder_name, key_hash

Repair = Literal["bias", "refit", "gates"]
M = TypeVar("M", bound=PrunableModel)
CODE: tuple[ModuleType, ...] = (
    batches, bias, gates, normal, rebuild, refit, rows, solvers, streams, slicing, statistics, prune.gates,
)  # fmt: skip
# samples that go through the models together
TOGETHER = 32


@dataclass(frozen=True)
class Repairs:
    """What is done to a cut model.

    Attributes:
        steps: Passes over the network, in their order; `bias` can only be the first.
        ridge: Pull of `refit` towards the present weights, in mean squares of the inputs.
        follow: How much of the stream's error `refit` makes up for at each consumer: 1 all of it, 0 only its own.
    """

    steps: tuple[Repair, ...] = ()
    ridge: float = 0.1
    follow: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.steps)) < len(self.steps):
            raise InputError(f"prune.repair={list(self.steps)}: must name each step once")
        if "bias" in self.steps[1:]:
            raise InputError(
                f"prune.repair={list(self.steps)}: bias must be the first; what comes before it would make up for the "
                "same mean"
            )


def repaired(
    repairs: Repairs, model: M, plan: Plan, data: DataBundle, store: Store, teacher: Mapping[str, Tensor] | None = None
) -> tuple[M, dict[str, Any], Fetched]:
    """Cut a model by a plan and make up for what is gone, or fetch that if it was done before.

    Merged tokens are made up for as well: consumers are fitted on what merging leaves. Tokens that a plan drops go
    after the repair.

    Args:
        repairs: What to do.
        model: The dense model; left as it was.
        plan: What stays.
        data: Calibration batches; labels are not looked at.
        store: Keeps the rewritten weights by content.
        teacher: Kept units of the model that gates are tuned to; None for the dense one.

    Returns:
        The repaired model, what was done as plain values, and where the weights lie.

    Raises:
        InputError: If there is no calibration data, or the model can't be repaired so.
    """
    refuse_unrepairable(repairs, model)
    merges = isinstance(plan.tokens, Reduction)
    units = plan if merges else replace(plan, tokens=None, token_counts=())
    key = repair_key(repairs, model, units, data, teacher)
    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, "repaired", key, lambda scratch: _done(repairs, model, units, data, teacher, scratch))
    pruned = cut(model, units)
    write(pruned, found.artifact.tensors)
    if plan.tokens is not None and not merges:
        pruned.reduce_tokens(plan.tokens)
    return pruned, found.artifact.facts, found


def refuse_unrepairable(repairs: Repairs, model: PrunableModel) -> None:
    """Raise an InputError if a model can't be repaired in one of these ways."""
    what = f"prune.repair={list(repairs.steps)}"
    if isinstance(model.reduction, Keeping) and model.reduction.merges:
        raise InputError(f"{what}: tokens of model={model.name} are dropped on their way; repair units first")
    rows.readers(model, what)


def repair_key(
    repairs: Repairs, model: PrunableModel, plan: Plan, data: DataBundle, teacher: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Everything that repaired weights depend on, as plain values."""
    settings: dict[str, Any] = {"steps": list(repairs.steps)}
    if "refit" in repairs.steps:
        settings |= {"ridge": repairs.ridge, "follow": repairs.follow}
    use_teacher = teacher is not None and "gates" in repairs.steps
    merged = {"tokens": plan.tokens.to_json()} if isinstance(plan.tokens, Reduction) else {}
    return {
        **merged,
        "settings": settings,
        "kept": _hash_of(plan.kept),
        "teacher": _hash_of(teacher) if use_teacher and teacher is not None else None,
        "weights": model.fingerprint(),
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "calibration": data.fingerprints["calibration"],
        "code": code_hash(type(model), *model.code, *CODE),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "device": model.device.type,
    }


def write(model: PrunableModel, tensors: Mapping[str, Tensor]) -> None:
    """Put weights and biases into a model's parameters of these names, in place; biases are added where it has none."""
    add_biases(model, [name.removesuffix(".bias") for name in tensors if name.endswith(".bias")])
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.network.get_parameter(name).copy_(tensor)


def _hash_of(kept: Mapping[str, Tensor]) -> str:
    return key_hash({name: fingerprint_of(units.to(torch.int64)) for name, units in kept.items()})


def _done(
    repairs: Repairs, model: PrunableModel, plan: Plan, data: DataBundle, teacher: Mapping[str, Tensor] | None,
    scratch: Scratch,
) -> Artifact:  # fmt: skip
    """Carry out the steps one after the other on a copy."""
    found = merged(calibration_of(data).calibration, TOGETHER)
    done = restarted(
        "repair", largest(found),
        lambda size: _steps_done(repairs, model, plan, at_most(found, size), teacher, scratch),
    )  # fmt: skip
    for step in repairs.steps:
        _part(scratch, step).path.unlink(missing_ok=True)
    return done


def _steps_done(
    repairs: Repairs, model: PrunableModel, plan: Plan, found: Sequence[Batch],
    teacher: Mapping[str, Tensor] | None, scratch: Scratch,
) -> Artifact:  # fmt: skip
    """The same with batches as they are; consumers that are finished are taken over."""
    student = cut(model, plan)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for step in repairs.steps:
        part = _step(step, repairs, model, student, plan, found, teacher, _part(scratch, step))
        tensors |= part.tensors
        facts[step] = part.facts["consumers"]
    return Artifact(tensors, facts)


def _step(
    step: Repair, repairs: Repairs, model: PrunableModel, student: PrunableModel, plan: Plan,
    found: Sequence[Batch], teacher: Mapping[str, Tensor] | None, scratch: Scratch,
) -> Artifact:  # fmt: skip
    if step == "bias":
        return compensated(model, student, plan.kept, found, "prune.repair=[bias]")
    if step == "refit":
        solver: Solver = Refit(repairs.ridge, repairs.follow)
        pair = Pair(unmerged(model), student, _everything(model), plan.kept, model)
        return rebuilt(pair, found, solver, "refit", scratch)
    wanted = _everything(model) if teacher is None else teacher
    tutor = unmerged(model if teacher is None else cut(model, Plan.of(model, wanted)))
    last = last_of_neurons(student) if reads_first_token(student, found[0]) else None
    return rebuilt(Pair(tutor, student, wanted, plan.kept, model), found, GateTuning(last), "gates", scratch)


def unmerged(model: M) -> M:
    """The model if it merges no tokens, else a copy that merges none."""
    if not isinstance(model.reduction, Reduction) or not (model.reduction.merges or model.reduction.front_only):
        return model
    whole = model.copy()
    whole.reduce_tokens(replace(model.reduction, merged=(0,) * model.reduction.blocks, front_only=False))
    return whole


def _part(scratch: Scratch, step: str) -> Scratch:
    """A scratch of its own for each step."""
    path: Path = scratch.path
    return Scratch(path.with_name(f"{path.stem}.{step}.partial"))


def _everything(model: PrunableModel) -> dict[str, Tensor]:
    return {group.name: torch.arange(group.count) for group in model.unit_groups()}


def last_of_neurons(model: PrunableModel) -> str | None:
    """The last block's consumer of units other than heads, if it is the last consumer of all."""
    groups = model.unit_groups()
    return groups[-1].consumer.module if groups and not groups[-1].pairwise_features else None


@torch.no_grad()
def reads_first_token(model: PrunableModel, batch: Batch) -> bool:
    """Whether answers depend on the first token alone of what the last block gives: tried out on a batch."""
    if not model.class_token or not model.blocks():
        return False
    placed = model.place(batch)

    def only_first(module: Any, args: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        changed = torch.cat([states[:, :1], torch.zeros_like(states[:, 1:])], dim=1)
        return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))

    with undisturbed(model.network):
        whole = model.logits(placed)
        with hooked(after=[(model.network.get_submodule(model.blocks()[-1]), only_first)]):
            return bool(torch.equal(model.logits(placed), whole))
