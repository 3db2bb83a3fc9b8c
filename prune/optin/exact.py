"""Exact OPTIN losses: every unit masked by itself, and only what that changes computed again.

For a unit of block i the blocks before it answer from memory, and so does everything in block
i up to the linear that reads the unit; that linear takes the unit's part from its dense output
instead of multiplying again. Several candidates are stacked along the batch.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from prune.gates import calibration_of, undisturbed
from prune.optin.losses import distilled, draw_rows, feature_rows, manifold_distance, sampled
from prune.optin.trajectory import Recorded, always, block_calls, reusable, tiled, without_units
from utils.errors import InputError
from utils.hooks import captured, replaying, watched
from utils.progress import Advance, progress_bar
from utils.storage import Artifact, Scratch

log = logging.getLogger(__name__)

Losses = dict[str, dict[str, Tensor]]
GIB = 2**30
# on a CPU more samples at once only leave its caches
MOST_SAMPLES_ON_CPU = 32


@dataclass(frozen=True)
class Settings:
    """What the losses depend on.

    Attributes:
        rows: Feature rows that stand for a batch, K.
        temperature: Its square is the factor of the logits' divergence.
        seed: Of the row sampler.
        memory_gb: What the candidates of one pass may take.
    """

    rows: int = 768
    temperature: float = 4.0
    seed: int = 0
    memory_gb: float = 4.0


@dataclass
class Teacher:
    """The dense model on one batch.

    Attributes:
        batch: The batch, on the model's device.
        logits: Its logits.
        blocks: Output of every block.
        rows: Which feature rows stand for each feature point; None means all.
        features: Those rows, normalised, (K, d).
    """

    batch: Batch
    logits: Tensor
    blocks: list[object]
    rows: dict[str, Tensor | None] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def exact_losses(
    model: PrunableModel,
    data: DataBundle,
    settings: Settings,
    scratch: Scratch | None = None,
    kinds: Collection[str] | None = None,
) -> Losses:
    """Score every unit of every group, averaged over the calibration batches.

    Args:
        model: The dense model; left exactly as it was.
        data: Calibration batches and the task.
        settings: See `Settings`.
        scratch: Where finished layers are kept, and gone on from.
        kinds: Which kinds of units to score, the others stay at 0; None means all.

    Returns:
        `md` (the feature points of the layers), `md_final` where there is a feature point
        behind the last block, and `kd`; per unit group (count,), float32, CPU.

    Raises:
        InputError: If the model has no feature points, or there is no calibration data.
    """
    refuse_without_trajectory(model)
    batches = calibration_of(data).calibration
    groups = [g for g in model.unit_groups() if g.count and (kinds is None or g.kind in kinds)]
    layers = sorted({group.layer for group in groups})
    steps = [(number, layer) for number in range(len(batches)) for layer in layers]
    sums, done = _left(scratch, model)
    with undisturbed(model.network), torch.inference_mode():
        total = sum(group.count for group in groups) * len(batches)
        counted = sum(group.count for number, layer in steps[:done] for group in groups if group.layer == layer)
        with progress_bar("optin", total, counted) as advance:
            teacher, current = None, -1
            for step, (number, layer) in enumerate(steps[done:], start=done + 1):
                if teacher is None or number != current:
                    teacher, current = observe(model, model.place(batches[number]), settings), number
                for group in (group for group in groups if group.layer == layer):
                    for name, values in group_losses(model, data, teacher, group, settings, advance).items():
                        sums[name][group.name] += values.float().cpu() / len(batches)
                if scratch is not None:
                    scratch.save(Artifact(_flat(sums), {"done": step}))
    return {name: values for name, values in sums.items() if name != "md_final" or has_final(model)}


def refuse_without_trajectory(model: PrunableModel) -> None:
    """Raise an InputError if the model names no feature point for each of its blocks."""
    points, blocks = len(model.feature_points()), len(model.blocks())
    if not blocks or points < blocks:
        raise InputError(
            f"prune=optin: model={model.name} names {points} feature points for {blocks} blocks; it needs one a block"
        )


def has_final(model: PrunableModel) -> bool:
    """Whether a feature point lies behind the last block."""
    return len(model.feature_points()) > len(model.blocks())


def _left(scratch: Scratch | None, model: PrunableModel) -> tuple[Losses, int]:
    """What an interrupted scoring left: sums so far, and how many steps they hold."""
    sums = {term: {g.name: torch.zeros(g.count) for g in model.unit_groups()} for term in ("md", "md_final", "kd")}
    if scratch is None or (found := scratch.load()) is None:
        return sums, 0
    for name, tensor in found.tensors.items():
        term, _, group = name.partition("/")
        sums[term][group] = tensor
    return sums, int(found.facts["done"])


def _flat(losses: Losses) -> dict[str, Tensor]:
    return {f"{term}/{group}": values for term, groups in losses.items() for group, values in groups.items()}


def observe(model: PrunableModel, batch: Batch, settings: Settings) -> Teacher:
    """Run the dense model once and keep what candidates are compared with."""
    points = model.feature_points()
    with captured(model.network, model.blocks()) as outputs, captured(model.network, points) as found:
        logits = model.logits(batch)
    teacher = Teacher(batch, logits, [outputs[name] for name in model.blocks()])
    for name in points:
        count = feature_rows(found[name]).shape[1]
        mask = batch.get("attention_mask")
        valid = mask.bool() if mask is not None and mask.numel() == count else None
        rows = draw_rows(count, settings.rows, valid, settings.seed)
        teacher.rows[name] = None if rows is None else rows.to(logits.device)
        teacher.features[name] = sampled(found[name], teacher.rows[name])[0]
    if (largest := max(len(rows) for rows in teacher.features.values())) < 2:
        raise InputError(f"prune=optin: a calibration batch gives {largest} feature rows; the Gram needs at least 2")
    return teacher


def compared_points(model: PrunableModel, layer: int) -> list[str]:
    """Feature points that a unit of a layer is judged by: those behind it; the last layer its own too."""
    points, last = model.feature_points(), len(model.blocks()) - 1
    return [*points[layer if layer == last else layer + 1 :]]


def group_losses(
    model: PrunableModel, data: DataBundle, teacher: Teacher, group: UnitGroup, settings: Settings, advance: Advance
) -> dict[str, Tensor]:
    """Losses of every unit of one group on one batch, each (count,)."""
    earlier = {
        name: always(output) for name, output in zip(model.blocks()[: group.layer], teacher.blocks, strict=False)
    }
    block = model.blocks()[group.layer]
    calls = block_calls(model, teacher.batch, earlier, block)
    scorer = _Scorer(model, data, teacher, group, calls)
    size = candidates_at_once(teacher, calls, settings, model.device)
    found: list[dict[str, Tensor]] = []
    first = 0
    while first < group.count:
        units = range(first, min(first + size, group.count))
        try:
            found.append(scorer.losses(units, settings.temperature))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if size == 1 or "memory" not in str(error):
                raise
            size = max(1, size // 2)
            scorer.forget()
            log.warning("optin: out of memory; going on with %d candidates at once", size)
            continue
        first += len(units)
        for _ in units:
            advance("")
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def candidates_at_once(teacher: Teacher, calls: Sequence[Recorded], settings: Settings, device: torch.device) -> int:
    """How many candidates fit into the memory that they may take."""
    outputs = [part for call in calls for part in _tensors(call.output)]
    bytes_each = 3 * sum(tensor.numel() * tensor.element_size() for tensor in outputs)
    fitting = int(settings.memory_gb * GIB / max(1, bytes_each))
    if device.type == "cpu":
        fitting = min(fitting, MOST_SAMPLES_ON_CPU // len(next(iter(teacher.batch.values()))))
    return max(1, fitting)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


class _Scorer:
    """Passes of stacked candidates of one group; what they share is stacked once."""

    def __init__(
        self, model: PrunableModel, data: DataBundle, teacher: Teacher, group: UnitGroup, calls: Sequence[Recorded]
    ) -> None:
        self.model, self.data, self.teacher, self.group = model, data, teacher, group
        self.points = compared_points(model, group.layer)
        self.reused = reusable(calls, group.consumer.module)
        self.consumer = next(call for call in calls if call.name == group.consumer.module)
        self.module = model.network.get_submodule(group.consumer.module)
        self.stacked: dict[int, tuple[Batch, dict]] = {}

    def forget(self) -> None:
        """Let go of what was stacked."""
        self.stacked.clear()

    def losses(self, units: Sequence[int], temperature: float) -> dict[str, Tensor]:
        """Losses of some units, each (C,)."""
        count, teacher = len(units), self.teacher
        batch, answers = self._shared(count)
        read, gave = self.consumer.inputs[0], self.consumer.output
        changed = without_units(self.module, read, gave, self.group, units)
        found = {term: torch.zeros(count, device=changed.device) for term in ("md", "md_final")}
        layers = set(self.model.feature_points()[: len(self.model.blocks())])

        def compare(name: str, features: Tensor) -> None:
            rows = sampled(features, teacher.rows[name], count)
            term = "md" if name in layers else "md_final"
            found[term] = found[term] + manifold_distance(rows, teacher.features[name])

        network = self.model.network
        with replaying(network, answers | {self.group.consumer.module: always(changed)}):
            with watched(network, self.points, compare):
                logits = self.model.logits(batch)
        given = logits.unflatten(0, (count, -1))  # (C, B, ...)
        deviations = self.data.task.deviation(given, teacher.logits, teacher.batch)
        return {**found, "kd": distilled(deviations, temperature)}

    def _shared(self, count: int) -> tuple[Batch, dict]:
        if count not in self.stacked:
            layer, blocks = self.group.layer, self.model.blocks()
            outputs = self.teacher.blocks[:layer]
            # only the last of them is read; the others answer each other
            answers = {name: always(output) for name, output in zip(blocks, outputs, strict=False)}
            if layer:
                answers[blocks[layer - 1]] = always(tiled(outputs[-1], count))
            answers |= {call.name: always(tiled(call.output, count)) for call in self.reused}
            batch = {name: tiled(tensor, count) for name, tensor in self.teacher.batch.items()}
            self.stacked[count] = batch, answers
        return self.stacked[count]
