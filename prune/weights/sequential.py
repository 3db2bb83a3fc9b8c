"""Rewriting a model block by block, kept after each one, so that a killed run goes on from there.

The published order: statistics of a block come from its own dense weights behind blocks that
are pruned already; then all its linears are pruned, and the data goes on through the result.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from data.base import DataBundle, fingerprint_of
from models.base import Batch, PrunableModel
from models.visiting import settle
from prune.gates import calibration_of, undisturbed
from prune.repair.batches import at_most, largest
from prune.weights.abreast import staged
from prune.weights.allotting import shares_of
from prune.weights.masks import Share, packed, unpacked
from prune.weights.matrices import Matrix, Solved, linear_of, prunable_matrices
from prune.weights.statistics import Joining, Statistic
from prune.weights.walk import Walk
from utils.distributed import rank, world_size
from utils.memory import restarted
from utils.progress import progress_bar
from utils.storage import Artifact, Scratch

if TYPE_CHECKING:
    from prune.weights.method import WeightSparsity

M = TypeVar("M", bound=PrunableModel)
# integers as wide as a floating type
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rewritten(method: "WeightSparsity", model: PrunableModel, data: DataBundle, scratch: Scratch) -> Artifact:
    """What to write into each linear: a packed mask, or new weights where a method changes what stays.

    Args:
        method: How weights are chosen.
        model: The dense model; left exactly as it was.
        data: Calibration batches.
        scratch: Keeps the shares; the files of finished blocks lie beside it.

    Returns:
        Tensors by the name of the linear; facts on each one under `matrices`.
    """
    if not method.looks_at_data:
        return _rewritten(method, model, [], scratch)
    batches = calibration_of(data).calibration
    return restarted(
        method.name, largest(batches), lambda size: _rewritten(method, model, at_most(batches, size), scratch)
    )


def _rewritten(method: "WeightSparsity", model: PrunableModel, batches: Sequence[Batch], scratch: Scratch) -> Artifact:
    """The same with batches as they are; blocks that are finished are taken over."""
    matrices = prunable_matrices(model, method.skip)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    with _working_copy(model, method.offload) as (copy, device), undisturbed(copy.network):
        shares = shares_of(method, copy, matrices, batches, device, scratch)
        own = own_batches(method, batches)
        walk = Walk(copy, own, device, method.offload, method.precision) if method.looks_at_data else None
        blocks = _Blocks(method, copy, walk, shares, scratch, joins=len(own) < len(batches))
        last = max(matrix.layer for matrix in matrices)
        with progress_bar(method.name, last + 1) as advance:
            for layer in range(last + 1):
                done = blocks.finished(layer, [m for m in matrices if m.layer == layer], layer == last)
                tensors, facts = tensors | done.tensors, facts | done.facts
                advance("")
    return Artifact(tensors, {"matrices": facts})


def own_batches(method: "WeightSparsity", batches: Sequence[Batch]) -> Sequence[Batch]:
    """The calibration batches that this process of a run sends through the model; what it takes from them is joined.

    All, where a statistic's bits depend on the order of its sum, or where there are fewer batches than processes.
    """
    divides = method.looks_at_data and isinstance(method.statistic(), Joining) and len(batches) >= world_size()
    return batches[rank() :: world_size()] if divides else batches


class _Blocks:
    """Finishes one block after the other in a working copy."""

    def __init__(
        self, method: "WeightSparsity", copy: PrunableModel, walk: Walk | None, shares: Mapping[str, Share],
        scratch: Scratch, joins: bool,
    ) -> None:  # fmt: skip
        self.method, self.copy, self.walk, self.shares, self.scratch = method, copy, walk, shares, scratch
        self.joins = joins
        # statistics of the dense model need a copy that stays dense
        self.dense = method.schedule == "dense"

    def finished(self, layer: int, matrices: Sequence[Matrix], last: bool) -> Artifact:
        """Solve a block or take over what is kept of it, and bring the data behind it."""
        kept = Scratch(block_file(self.scratch.path, layer))
        left = kept.load()
        with self.walk.resident(layer) if self.walk else nullcontext():
            done = left or self._solved(layer, matrices, last)
            if left is None:
                kept.save(done)
            elif not self.dense:
                write(self.copy.network, done.tensors)
            went_on = self.method.schedule in ("dense", "one_forward") and left is None and matrices
            if self.walk and not last and not went_on:
                self.walk.advance(layer)
        return done

    def _solved(self, layer: int, matrices: Sequence[Matrix], last: bool) -> Artifact:
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        by_name = {matrix.name: matrix for matrix in matrices}
        with closing(self._stages(layer, list(by_name), last)) as stages:
            for names, statistic in stages:
                if self.joins and isinstance(statistic, Joining):
                    statistic.join()
                weights = [linear_of(self.copy.network, name).weight.detach() for name in names]
                solutions = self.method.solve(weights, statistic, [self.shares[name] for name in names])
                for name, weight, solved in zip(names, weights, solutions, strict=True):
                    facts[name] = self._checked(by_name[name], solved) | _seen(statistic)
                    found = packed(solved.removed) if solved.weight is None else solved.weight.to(weight.dtype)
                    tensors[name] = found.cpu()
                    if not self.dense:
                        write(self.copy.network, {name: found})
        return Artifact(tensors, facts)

    def _checked(self, matrix: Matrix, solved: Solved) -> dict[str, Any]:
        removed = int(torch.count_nonzero(solved.removed))
        self.method.check_reached(matrix, self.shares[matrix.name], removed)
        return {"removed": removed, **solved.facts}

    def _stages(self, layer: int, names: list[str], last: bool) -> Generator[tuple[Sequence[str], Statistic | None]]:
        """Linears to be solved together, in order; what comes later sees what was written before."""
        if self.walk is None:
            yield from (((name,), None) for name in names)
        elif self.method.schedule == "one_forward":
            yield from staged(self.walk, layer, names, self.method.statistic, last) if names else ()
        elif self.method.schedule != "true_sequential":
            go_on = self.dense and not last
            yield from self.walk.statistics(layer, names, self.method.statistic, go_on=go_on) if names else ()
        else:
            while names:
                for stage, statistic in self.walk.statistics(layer, names, self.method.statistic, first_stage=True):
                    names = [name for name in names if name not in stage]
                    yield stage, statistic


def written(model: M, tensors: Mapping[str, Tensor]) -> M:
    """A copy of the model with these masks and weights in place."""
    copy = model.copy()
    write(copy.network, tensors)
    return copy


def write(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put masks (packed, uint8) and new weights into the linears that they are named after, in place."""
    for name, tensor in tensors.items():
        weight = linear_of(network, name).weight.data
        if tensor.dtype == torch.uint8:
            zero_where(weight, unpacked(tensor, tuple(weight.shape)).to(weight.device))
        else:
            weight.copy_(tensor)


def zero_where(weight: Tensor, removed: Tensor) -> None:
    """Put zeros, never negative ones, where a mask of the same shape says so, in place."""
    # a product of whole numbers: several times as fast as a choice of random places, and no sign is left
    weight.view(WHOLE[weight.element_size()]).mul_(~removed)


def block_file(scratch: Path, layer: int) -> Path:
    """Where a finished block is kept until the whole model is."""
    return scratch.with_name(f"{scratch.stem}.block{layer:04}.partial")


def block_files(path: Path) -> list[Path]:
    """All files of finished blocks beside an artifact."""
    return sorted(path.parent.glob(f"{path.stem}.block*.partial"))


def _seen(statistic: Statistic | None) -> dict[str, Any]:
    """What a matrix was judged by."""
    if statistic is None:
        return {}
    return {"tokens": statistic.tokens, "statistic": fingerprint_of(statistic.norms())[:16]}


@contextmanager
def _working_copy(model: M, offload: bool) -> Iterator[tuple[M, torch.device]]:
    """A copy to prune, and where to compute; with `offload` both models lie in main memory meanwhile."""
    device = model.device
    try:
        if offload:
            model.network.to("cpu")
        yield model.copy(), device
    finally:
        settle(model, device)
