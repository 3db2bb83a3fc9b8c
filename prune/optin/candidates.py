"""Passes of stacked candidates: every unit of a group masked by itself, only what that changes computed again.

For a unit of block i the blocks before it answer from memory, and so does everything in block
i up to the linear that reads the unit; that linear takes the unit's part from its dense output
instead of multiplying again. Several candidates are stacked along the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from prune.optin.losses import distilled, manifold_distance, sampled
from prune.optin.precision import in_float32
from prune.optin.teacher import Settings, Teacher, compared_points, tensors_of
from prune.optin.trajectory import Recorded, always, block_calls, calls_before, reusable, tiled, without_units
from utils.distributed import Turns
from utils.hooks import replaying, watched
from utils.memory import Portions
from utils.progress import Advance

GIB = 2**30
# on a CPU larger stacks only leave its caches
MOST_BYTES_ON_CPU = 8 * 2**20

TERMS = ("md", "md_final", "kd")
Losses = dict[str, Tensor]


def group_losses(
    model: PrunableModel, data: DataBundle, teacher: Teacher, group: UnitGroup, settings: Settings, advance: Advance,
    turns: Turns | None = None,
) -> Losses:  # fmt: skip
    """Losses of every unit of one group on one batch, each (count,); with `turns` see `in_turns`."""
    calls = calls_of_block(model, teacher, group.layer)
    scorer = _UnitPasses(model, data, teacher, group, calls)
    size = candidates_at_once(calls, teacher.logits, settings)
    return in_turns(group.count, size, lambda units: scorer.losses(units, settings.temperature), scorer, advance, turns)


def calls_of_block(model: PrunableModel, teacher: Teacher, layer: int) -> list[Recorded]:
    """The dense model's calls inside one block, in order."""
    earlier = zip(model.blocks()[:layer], teacher.blocks, strict=False)
    answers = {name: always(output) for name, output in earlier}
    return block_calls(model, teacher.batch, answers, model.blocks()[layer])


def in_chunks(count: int, size: int, losses: Callable[[range], Losses], cached: "Stacked", advance: Advance) -> Losses:
    """Score candidates `size` at a time; where memory runs out, half as many."""

    def some(units: range) -> Losses:
        scored = losses(units)
        for _ in units:
            advance("")
        return scored

    found = [*Portions("optin", "candidates", size, cached.forget).each(count, some)]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def in_turns(
    count: int, size: int, losses: Callable[[range], Losses], cached: "Stacked", advance: Advance, turns: Turns | None
) -> Losses:
    """Score the candidates that fall to this process, in the stacks that a single process makes; 0 for the others."""
    if turns is None:
        return in_chunks(count, size, losses, cached, advance)
    found = {term: torch.zeros(count) for term in TERMS}
    for first in range(0, count, size):
        units = range(first, min(first + size, count))
        if not turns.own(len(units)):
            for _ in units:
                advance("")
            continue
        scored = in_chunks(len(units), len(units), partial(_shifted, losses, first), cached, advance)
        for term, values in scored.items():
            found[term][units.start : units.stop] = values.float().cpu()
    return found


def _shifted(losses: Callable[[range], Losses], first: int, units: range) -> Losses:
    return losses(range(first + units.start, first + units.stop))


def candidates_at_once(calls: Sequence[Recorded], logits: Tensor, settings: Settings) -> int:
    """How many candidates fit into the memory that they may take.

    Args:
        calls: What one candidate has to compute in its own block.
        logits: Its logits, which are compared in float32; those of a language model outweigh all else.
        settings: Says how much memory.
    """
    sizes = [part.numel() * part.element_size() for call in calls for part in tensors_of(call.output)]
    sizes.append(4 * logits.numel())
    fitting = int(settings.memory_gb * GIB / max(1, 3 * sum(sizes)))
    if logits.device.type == "cpu":
        fitting = min(fitting, MOST_BYTES_ON_CPU // max(1, *sizes))
    return max(1, fitting)


class Stacked:
    """What passes of one size share, stacked once."""

    def __init__(self) -> None:
        self.stacked: dict[int, tuple[Batch, dict]] = {}

    def forget(self) -> None:
        """Let go of what was stacked."""
        self.stacked.clear()


class _UnitPasses(Stacked):
    """Passes of stacked candidates of one group."""

    def __init__(
        self, model: PrunableModel, data: DataBundle, teacher: Teacher, group: UnitGroup, calls: Sequence[Recorded]
    ) -> None:
        super().__init__()
        self.model, self.data, self.teacher, self.group = model, data, teacher, group
        self.points = compared_points(model, group.layer)
        self.reused = reusable(calls, group.consumer.module)
        # where blocks are read beyond the next one, all that was done before this one answers by itself
        block = model.blocks()[group.layer]
        self.before = [] if model.chained else calls_before(model, teacher.batch, block)
        self.consumer = next(call for call in calls if call.name == group.consumer.module)
        self.module = model.network.get_submodule(group.consumer.module)
        self.index = group.consumer.index.to(model.device)  # (count, width)

    def losses(self, units: range, temperature: float) -> Losses:
        """Losses of some units, each (C,)."""
        count, teacher = len(units), self.teacher
        batch, answers = self._shared(count)
        read, gave = self.consumer.inputs[0], self.consumer.output
        with in_float32(self.model.device):
            changed = without_units(self.module, read, gave, self.group, self.index[units.start : units.stop])

        def distance(name: str, features: Tensor) -> Tensor:
            rows = sampled(features, teacher.rows[name], count, self.model.feature_axis)
            return manifold_distance(rows, teacher.features[name])

        with replaying(self.model.network, answers | {self.group.consumer.module: always(changed)}):
            return compared(self.model, self.data, teacher, batch, self.points, count, distance, temperature)

    def _chain(self, count: int) -> dict:
        """Answers of the blocks before: only the last of them is read, the others answer each other."""
        layer, blocks = self.group.layer, self.model.blocks()
        outputs = self.teacher.blocks[:layer]
        answers = {name: always(output) for name, output in zip(blocks, outputs, strict=False)}
        if layer:
            answers[blocks[layer - 1]] = always(tiled(outputs[-1], count))
        return answers

    def _shared(self, count: int) -> tuple[Batch, dict]:
        if count not in self.stacked:
            answers = {} if self.before else self._chain(count)
            ran = [*(self.before or self.teacher.embedding), *self.reused]
            answers |= {call.name: always(tiled(call.output, count)) for call in ran}
            batch = {name: tiled(tensor, count) for name, tensor in self.teacher.batch.items()}
            self.stacked[count] = batch, answers
        return self.stacked[count]


def compared(
    model: PrunableModel, data: DataBundle, teacher: Teacher, batch: Batch, points: Sequence[str], count: int,
    distance: Callable[[str, Tensor], Tensor], temperature: float,
) -> Losses:  # fmt: skip
    """Run one pass of stacked candidates and hold its features and logits against the dense model's.

    Args:
        model: The model, with whatever makes the candidates in place.
        data: The task.
        teacher: The dense model on the batch.
        batch: What the network is given.
        points: Feature points to compare.
        count: Candidates in the pass, C.
        distance: Of a point's stacked features from the dense ones, (C,).
        temperature: Its square is the factor of the logits' divergence.

    Returns:
        `md` (feature points of the layers), `md_final` (one behind the last block) and `kd`; each (C,).
    """
    layers = set(model.feature_points()[: len(model.blocks())])
    found = {term: torch.zeros(count, device=teacher.logits.device) for term in ("md", "md_final")}

    def compare(name: str, features: Tensor) -> None:
        term = "md" if name in layers else "md_final"
        with in_float32(features.device):
            found[term] = found[term] + distance(name, features)

    with watched(model.network, points, compare):
        logits = model.logits(batch)
    given = logits.float().unflatten(0, (count, -1))  # (C, B, ...)
    deviations = data.task.deviation(given, teacher.logits.float(), teacher.batch)
    return {**found, "kd": distilled(deviations, temperature)}
