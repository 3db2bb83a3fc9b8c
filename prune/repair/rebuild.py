"""Consumers solved one after the other, in order of execution, on what the pruned model so far gives them.

Two models run side by side on the calibration data: the teacher, whose outputs are wanted, and the student, which is
rewritten on its way. At each consumer t and s are what the teacher and the student add its output to. What is wanted
of the student's consumer is the teacher's output and, times `follow`, what its stream lacks: `y + follow * (t - s)`.
Where the student merges tokens, a token is held against the mean of the teacher's tokens that it stands for.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from models.merging import member_means
from prune.gates import undisturbed
from prune.repair.normal import Normal
from prune.repair.rows import Reader, kept_outputs, readers
from prune.repair.streams import Stop, advance_all, streams
from utils.errors import RunError
from utils.progress import progress_bar
from utils.storage import Artifact, Scratch

Which = Literal["all", "first", "none"]
Kept = Mapping[str, Tensor]
# so many seconds of work may be lost to a killed run
SAVED_EVERY_S = 30.0


class Solver(Protocol):
    """What changes a consumer."""

    @property
    def follow(self) -> float:
        """How much of the stream's error a consumer makes up for."""
        ...

    def rows(self, reader: Reader) -> Which:
        """Which rows count: all, the first token of every sample, or none, which leaves the consumer as it is."""
        ...

    def solve(self, reader: Reader, normal: Normal, scale: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        """The change of matrix and bias, (k + 1, D) float64, or None for none, and facts on it."""
        ...


@dataclass(frozen=True)
class Pair:
    """Two models that run side by side.

    Attributes:
        teacher: What is wanted; it merges no tokens.
        student: What is rewritten, in place.
        teacher_kept: Units of the dense model that the teacher has.
        student_kept: Units of it that the student has.
        dense: The model that both were cut from.
    """

    teacher: PrunableModel
    student: PrunableModel
    teacher_kept: Kept
    student_kept: Kept
    dense: PrunableModel


@torch.no_grad()
def rebuilt(pair: Pair, batches: Sequence[Batch], solver: Solver, title: str, scratch: Scratch | None) -> Artifact:
    """Rewrite the student's consumers, in place.

    Args:
        pair: The models; the teacher stays as it was.
        batches: Calibration data.
        solver: What is done at each consumer.
        title: Label of the progress bar, and the setting that asks.
        scratch: Where solved consumers are kept, so that a killed run goes on with the same numbers.

    Returns:
        New weights and biases by name, and under `consumers` what was done.
    """
    return rebuilt_abreast([pair], batches, solver, title, scratch)[0]


@torch.no_grad()
def rebuilt_abreast(
    pairs: Sequence[Pair], batches: Sequence[Batch], solver: Solver, title: str, scratch: Scratch | None = None
) -> list[Artifact]:
    """Rewrite the consumers of several students of one teacher, in place; the teacher runs once for all of them.

    Args:
        pairs: At least one, all with the same teacher.
        batches: Calibration data.
        solver: What is done at each consumer; remembers nothing where there are several students.
        title: Label of the progress bar, and the setting that asks.
        scratch: As for `rebuilt`; None where there are several students.

    Returns:
        What `rebuilt` returns, a student.
    """
    teacher, left = pairs[0].teacher, scratch.load() if scratch is not None else None
    students = [_Student(pair, title, left or Artifact({}, {"consumers": []})) for pair in pairs]
    names, others = list(students[0].own), readers(teacher, title)
    saved = time.monotonic()
    with ExitStack() as stack:
        for network in (teacher.network, *(pair.student.network for pair in pairs)):
            stack.enter_context(undisturbed(network))
        ahead = stack.enter_context(streams(teacher, names, batches, inputs=False))
        behind = [stack.enter_context(streams(pair.student, names, batches)) for pair in pairs]
        advance = stack.enter_context(progress_bar(title, len(names)))
        seen: dict[str, object] = {}
        while (wanted := advance_all(ahead, seen)) is not None:
            name, stops = wanted
            for student, running in zip(students, behind, strict=True):
                student.rewrite(others[name], stops, _same(name, advance_all(running, seen)), batches, solver)
                if scratch is not None and time.monotonic() - saved > SAVED_EVERY_S:
                    scratch.save(student.done)
                    saved = time.monotonic()
            seen[name] = True
            advance(name)
    return [student.done for student in students]


class _Student:
    """A student on its way: its consumers, and those that are done."""

    def __init__(self, pair: Pair, title: str, done: Artifact) -> None:
        self.own, self.outputs, self.done = readers(pair.student, title), _outputs(pair), done

    def rewrite(
        self, other: Reader, wanted: Sequence[Stop], given: Sequence[Stop], batches: Sequence[Batch], solver: Solver
    ) -> None:
        """Solve the consumer where all batches wait, unless that is done, and go on with what it then gives."""
        name = other.name
        reader = self.own[name]
        if f"{name}.weight" not in self.done.tensors:
            normal, scale = _summed(reader, other, wanted, given, batches, solver, self.outputs[name])
            self.done = _with(self.done, reader, *_change(solver, reader, normal, scale))
        _write(reader, self.done)
        for stop in given:
            stop.replace(reader.module.forward(stop.inputs))


def _same(name: str, found: tuple[str, list[Stop]] | None) -> list[Stop]:
    if found is None or found[0] != name:
        raise RunError(f"the pruned model comes to {found and found[0]} where the dense one comes to {name}")
    return found[1]


def _outputs(pair: Pair) -> dict[str, tuple[Tensor, Tensor]]:
    """Per consumer the student's outputs that the teacher has too, and where the teacher has them."""
    dense = readers(pair.dense, "prune.repair")
    found = {}
    for name in dense:
        mine, theirs = (kept_outputs(pair.dense, kept, dense[name]) for kept in (pair.student_kept, pair.teacher_kept))
        common = torch.isin(mine, theirs).nonzero().flatten()
        found[name] = common, torch.searchsorted(theirs, mine[common])
    return found


def _summed(
    reader: Reader, other: Reader, wanted: Sequence[Stop], given: Sequence[Stop], batches: Sequence[Batch],
    solver: Solver, outputs: tuple[Tensor, Tensor],
) -> tuple[Normal | None, Tensor | None]:  # fmt: skip
    """Normal equations over all batches; and the factor behind the consumer, where there is one."""
    which = solver.rows(reader)
    if which == "none":
        return None, None
    first = which == "first"
    normal = Normal.none(reader.columns, reader.outputs, reader.module.weight.device)
    for theirs, mine, batch in zip(wanted, given, batches, strict=True):
        gave = _wide(reader.given(mine.output, batch, first))
        rest = _missing(other.given(as_merged(_wide(theirs.output), mine), batch, first), gave, outputs)
        if solver.follow and theirs.residual is not None and mine.residual is not None:
            lack = reader.given(as_merged(_wide(theirs.residual), mine) - _wide(mine.residual), batch, first)
            rest += solver.follow * _unscaled(lack, mine.scale)
        x = reader.rows(mine.inputs, batch, first) if reader.columns else gave[:, :0]
        normal = normal.add(x, rest)
    return normal, given[0].scale


def _missing(target: Tensor, gave: Tensor, outputs: tuple[Tensor, Tensor]) -> Tensor:
    """What is wanted less what is given, (N, D); zero for outputs that the teacher has not."""
    common, place = (index.to(gave.device) for index in outputs)
    if len(common) == gave.shape[1] == target.shape[1]:
        return target - gave  # to pick columns takes longer than all the rest
    rest = torch.zeros_like(gave)
    rest[:, common] = target[:, place] - gave[:, common]
    return rest


def as_merged(wanted: Tensor, mine: Stop) -> Tensor:
    """What a teacher has for all tokens, for those that the student's consumer gives something for.

    Args:
        wanted: (B, T, D), or maps of an image.
        mine: Where the student stands; it may give (B, T - r, D), or only the first of these tokens.
    """
    if wanted.shape[1:-1] == mine.output.shape[1:-1] or wanted.ndim != 3:
        return wanted
    merged = wanted if mine.source is None else member_means(wanted, mine.source)
    return merged[:, : mine.output.shape[1]]


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or what it is in if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unscaled(lack: Tensor, scale: Tensor | None) -> Tensor:
    """What the consumer has to give for this to reach the stream; nothing where the factor lets nothing through."""
    if scale is None:
        return lack
    factor = _wide(scale)
    return torch.where(factor.abs() > 1e-6, lack / factor, 0.0)


def _change(
    solver: Solver, reader: Reader, normal: Normal | None, scale: Tensor | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """What to add to a consumer, and what that does to the error."""
    if normal is None:
        return None, {"skipped": True}
    delta, facts = solver.solve(reader, normal, scale)
    before = float(normal.error.sum())
    after = before if delta is None else float(normal.error_after(delta).sum())
    return delta, {"rows": normal.rows, "error_before": before, "error_after": after, **facts}


def _with(done: Artifact, reader: Reader, delta: Tensor | None, facts: dict[str, Any]) -> Artifact:
    """The artifact with one more consumer; one that is not changed is kept as it is, so that it is known as done."""
    module = reader.module
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone() if reader.biased else None
    if delta is not None and bool(delta.any()):
        weight = reader.written(reader.matrix() + delta[:-1])
        bias = None if bias is None else (bias.double() + delta[-1]).to(bias.dtype)
    tensors = {f"{reader.name}.weight": weight} | ({f"{reader.name}.bias": bias} if bias is not None else {})
    units = sum(group.count for group in reader.groups)
    row = {"consumer": reader.name, "units": units, **facts}
    return Artifact(done.tensors | tensors, {**done.facts, "consumers": [*done.facts["consumers"], row]})


def _write(reader: Reader, done: Artifact) -> None:
    reader.module.weight.data.copy_(done.tensors[f"{reader.name}.weight"])
    if reader.biased:
        reader.module.bias.data.copy_(done.tensors[f"{reader.name}.bias"])
