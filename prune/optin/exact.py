"""Exact OPTIN losses of a whole model: every unit masked by itself, layer by layer, resumable."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel, UnitGroup
from prune.gates import calibration_of, undisturbed
from prune.optin.candidates import TERMS, group_losses
from prune.optin.combine import TOKEN
from prune.optin.precision import computed_in
from prune.optin.teacher import Settings, Teacher, has_final, leaked_outputs, observe, refuse_without_trajectory
from prune.optin.tokens import positions_in, refuse_without_tokens, token_losses, tokens_of
from utils.distributed import Turns, summed, world_size
from utils.errors import InputError
from utils.progress import Advance, progress_bar
from utils.storage import Artifact, Scratch

Losses = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """The units of one group, or the token positions of one layer.

    Attributes:
        name: Of the group, or of the layer's tokens.
        layer: Position of the block, from 0.
        count: How many there are.
        losses: Scores all of them on one batch.
    """

    name: str
    layer: int
    count: int
    losses: Callable[[Teacher, Advance, Turns | None], dict[str, Tensor]]


def exact_losses(
    model: PrunableModel,
    data: DataBundle,
    settings: Settings,
    scratch: Scratch | None = None,
    kinds: Collection[str] | None = None,
    leak: bool = False,
) -> Losses:
    """Score every unit of every group, averaged over the calibration batches.

    Args:
        model: The dense model; left exactly as it was.
        data: Calibration batches and the task.
        settings: See `Settings`.
        scratch: Where finished layers are kept, and gone on from.
        kinds: Which kinds of units to score, the others stay at 0; `token` stands for the token
            positions of every layer. None means all units, and no tokens.
        leak: Whether the last head of every earlier layer is masked while heads are scored, as
            in the released code.

    Returns:
        `md` (the feature points of the layers), `md_final` where there is a feature point
        behind the last block, and `kd`; per unit group (count,), float32, CPU.

    Raises:
        InputError: If the model has no feature points, or there is no calibration data.
    """
    refuse_without_trajectory(model)
    if leak and not model.chained:
        raise InputError(f"prune.mode=compat: blocks of model={model.name} are no chain, as the released code needs")
    batches = calibration_of(data).calibration
    sums, done = _left(scratch, model)
    with undisturbed(model.network), torch.inference_mode(), computed_in(settings.precision, model.device):
        teacher, current = observe(model, model.place(batches[0]), settings), 0
        parts = parts_of(model, data, settings, kinds, leak, teacher)
        layers = sorted({part.layer for part in parts})
        steps = [(number, layer) for number in range(len(batches)) for layer in layers]
        counted = sum(part.count for _, layer in steps[:done] for part in parts if part.layer == layer)
        with progress_bar("optin", sum(part.count for part in parts) * len(batches), counted) as advance:
            for step, (number, layer) in enumerate(steps[done:], start=done + 1):
                if number != current:
                    teacher, current = observe(model, model.place(batches[number]), settings), number
                scored = _scored([part for part in parts if part.layer == layer], teacher, advance)
                for (term, name), values in scored.items():
                    sums[term][name] = sums[term][name] + values / len(batches)
                if scratch is not None:
                    scratch.save(Artifact(_flat(sums), {"done": step}))
    return {term: values for term, values in sums.items() if term != "md_final" or has_final(model)}


def _scored(parts: Sequence[Part], teacher: Teacher, advance: Advance) -> dict[tuple[str, str], Tensor]:
    """Losses by term and part; each stack of candidates is scored by one of a run's processes."""
    turns, found = Turns() if world_size() > 1 else None, dict[str, Tensor]()
    for part in parts:
        losses = part.losses(teacher, advance, turns)
        found |= {f"{term}/{part.name}": values.float().cpu() for term, values in losses.items()}
    # the others' are zeros, so that a sum changes no bit
    keyed = {name: name.split("/", 1) for name in found}
    return {(keyed[name][0], keyed[name][1]): values for name, values in summed(found).items()}


def parts_of(
    model: PrunableModel, data: DataBundle, settings: Settings, kinds: Collection[str] | None, leak: bool,
    teacher: Teacher,
) -> list[Part]:  # fmt: skip
    """What is to be scored, layer by layer: heads, then neurons, then token positions."""
    parts = []
    for group in (g for g in model.unit_groups() if g.count and (kinds is None or g.kind in kinds)):
        score = partial(_leaked_losses if leak and group.kind == "head" else _losses, model, data, group, settings)
        parts.append(Part(group.name, group.layer, group.count, score))
    if kinds is not None and TOKEN in kinds:
        refuse_without_tokens(model)
        for layer in range(len(model.blocks())):
            score = partial(_token_losses, model, data, layer, settings)
            parts.append(Part(tokens_of(model, layer), layer, positions_in(teacher), score))
    return parts


def _losses(
    model: PrunableModel, data: DataBundle, group: UnitGroup, settings: Settings, teacher: Teacher, advance: Advance,
    turns: Turns | None,
) -> dict[str, Tensor]:  # fmt: skip
    return group_losses(model, data, teacher, group, settings, advance, turns)


def _leaked_losses(
    model: PrunableModel, data: DataBundle, group: UnitGroup, settings: Settings, teacher: Teacher, advance: Advance,
    turns: Turns | None,
) -> dict[str, Tensor]:  # fmt: skip
    prefix = replace(teacher, blocks=leaked_outputs(model, teacher.batch, group.layer))
    return group_losses(model, data, prefix, group, settings, advance, turns)


def _token_losses(
    model: PrunableModel, data: DataBundle, layer: int, settings: Settings, teacher: Teacher, advance: Advance,
    turns: Turns | None,
) -> dict[str, Tensor]:  # fmt: skip
    return token_losses(model, data, teacher, layer, settings, advance, turns)


def _left(scratch: Scratch | None, model: PrunableModel) -> tuple[Losses, int]:
    """What an interrupted scoring left: sums so far, and how many steps they hold."""
    sums: Losses = {term: defaultdict(lambda: torch.zeros(())) for term in TERMS}
    for term in TERMS:
        sums[term].update({group.name: torch.zeros(group.count) for group in model.unit_groups()})
    if scratch is None or (found := scratch.load()) is None:
        return sums, 0
    for name, tensor in found.tensors.items():
        term, _, group = name.partition("/")
        sums[term][group] = tensor
    return sums, int(found.facts["done"])


def _flat(losses: Losses) -> dict[str, Tensor]:
    return {f"{term}/{group}": values for term, groups in losses.items() for group, values in groups.items()}
