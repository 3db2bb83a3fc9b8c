"""Bias compensation: what the removed units gave on average goes into the consumer's bias."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from models.biases import add_biases
from prune.gates import undisturbed
from prune.repair.rows import Reader, kept_outputs, readers
from prune.repair.streams import advance_all, streams
from utils.progress import progress_bar
from utils.storage import Artifact


def missing_mean(means: Tensor, matrix: Tensor, gone: Tensor) -> Tensor:
    """Mean output of the columns that go: `sum over gone i of mean(x_i) W_i`.

    Args:
        means: Mean of every column over the calibration rows, (k,).
        matrix: The dense consumer's weights, (k, D).
        gone: Columns that go.

    Returns:
        (D,)
    """
    return means[gone] @ matrix[gone]


@torch.no_grad()
def compensated(
    dense: PrunableModel, student: PrunableModel, kept: Mapping[str, Tensor], batches: Sequence[Batch], what: str
) -> Artifact:
    """Add to the student's biases, in place, what its missing units gave in the dense model on average.

    A consumer without a bias that loses units is given one.

    Args:
        dense: The model that was cut; left as it was.
        student: What is left of it.
        kept: Units that it has.
        batches: Calibration data; padding does not count.
        what: Label of the progress bar, and the setting that asks.

    Returns:
        New biases by name, and under `consumers` how large the compensation is.
    """
    found, own = readers(dense, what), readers(student, what)
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, means in _column_means(dense, found, batches, what).items():
        reader, module = found[name], own[name].module
        gone = _gone(reader, kept).to(means.device)
        left = kept_outputs(dense, kept, reader).to(means.device)
        added = missing_mean(means, reader.matrix(), gone)[left]
        if len(gone):
            add_biases(student, [name])
            module.bias.data.copy_((module.bias.double() + added).to(module.bias.dtype))
            tensors[f"{name}.bias"] = module.bias.detach().clone()
        rows.append({"consumer": name, "units": sum(g.count for g in own[name].groups), "added": float(added.norm())})
    return Artifact(tensors, {"consumers": rows})


def _column_means(
    dense: PrunableModel, found: Mapping[str, Reader], batches: Sequence[Batch], what: str
) -> dict[str, Tensor]:
    """Mean over valid rows of each column that a consumer reads, (k,) float64, in order of execution."""
    means: dict[str, Tensor] = {}
    with (
        undisturbed(dense.network),
        streams(dense, list(found), batches) as running,
        progress_bar(what, len(found)) as advance,
    ):
        while (reached := advance_all(running, means)) is not None:
            name, stops = reached
            reader = found[name]
            rows = [reader.rows(s.inputs, b) for s, b in zip(stops, batches, strict=True) if reader.columns]
            sums = [
                part.to(torch.promote_types(part.dtype, torch.float32)).sum(dim=0, dtype=torch.float64) for part in rows
            ]
            total = sum(map(len, rows))
            zeros = torch.zeros(reader.columns, dtype=torch.float64, device=reader.module.weight.device)
            means[name] = sum(sums, zeros) / max(1, total)
            advance(name)
    return means


def _gone(reader: Reader, kept: Mapping[str, Tensor]) -> Tensor:
    """Columns of the units that go, ascending."""
    staying = torch.zeros(sum(group.count for group in reader.groups) + 1, dtype=torch.bool)
    staying[-1] = True  # columns of no unit stay
    start = 0
    for group in reader.groups:
        staying[start + kept[group.name]] = True
        start += group.count
    return (~staying[reader.units()]).nonzero().flatten()
