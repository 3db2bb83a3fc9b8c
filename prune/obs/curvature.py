"""What calibration data tells of each consumer: second moments of what it reads, and of the divergence's gradient.

The two are the factors of a Kronecker-factored Fisher information (Martens and Grosse, 2015, arXiv:1503.05671); no
label is looked at. Shapes: N rows (tokens that are no padding), k columns of the consumer, D outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.base import DataBundle, Distributing, Probing, Task, divergence_probe, random_signs
from models.base import Batch, PrunableModel
from prune.gates import calibration_of, undisturbed
from prune.repair.batches import at_most, largest, merged
from prune.repair.normal import gram
from prune.repair.rows import Reader, readers
from utils.distributed import rank, summed, world_size
from utils.hooks import hooked
from utils.memory import restarted
from utils.progress import progress_bar

# samples that go through the model together
TOGETHER = 16


@dataclass(frozen=True)
class Curvature:
    """Moments of one consumer, float64.

    Attributes:
        inputs: Mean of `x x^T` over rows, with a one behind x, (k + 1, k + 1).
        outputs: Mean of `g g^T` over rows, g the gradient at the consumer's output, (D, D).
        rows: Rows a sample.
    """

    inputs: Tensor
    outputs: Tensor
    rows: float


class _Sums:
    """Sums over rows of one consumer."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.inputs = torch.zeros(reader.columns + 1, reader.columns + 1, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(reader.outputs, reader.outputs, dtype=torch.float64, device=device)
        self.rows = 0

    def read(self, x: Tensor) -> None:
        """Take in what the consumer reads, (N, k)."""
        x = x.float()
        sums = x.sum(dim=0)
        self.inputs[:-1, :-1] += gram(x)
        self.inputs[-1, :-1] += sums
        self.inputs[:-1, -1] += sums
        self.inputs[-1, -1] += len(x)
        self.rows += len(x)

    def answered(self, g: Tensor) -> None:
        """Take in the gradient at what it gives, (N, D)."""
        self.outputs += gram(g.float())


def curvatures(model: PrunableModel, data: DataBundle, seed: int) -> dict[str, Curvature]:
    """Moments of every consumer over the calibration data, by one forward and one backward pass a batch.

    Args:
        model: The model; left exactly as it was.
        data: Source of the batches and of the task.
        seed: Of the random probes of the divergence.

    Returns:
        Per consumer that ran, by module name.

    Raises:
        InputError: If there is no calibration data, or a consumer is no plain matrix product.
    """
    batches = merged(calibration_of(data).calibration, TOGETHER)
    return restarted("curvature", largest(batches), lambda size: _curvatures(model, data.task, batches, seed, size))


def _curvatures(
    model: PrunableModel, task: Task, batches: Sequence[Batch], seed: int, size: int
) -> dict[str, Curvature]:
    """The same with `size` samples at once; random numbers belong to the whole batch."""
    found = readers(model, "prune=obs")
    sums = {name: _Sums(reader, model.device) for name, reader in found.items()}
    samples = 0
    with undisturbed(model.network), progress_bar("curvature", len(batches)) as advance:
        for number, batch in enumerate(batches):
            samples += len(next(iter(batch.values())))
            if number % world_size() == rank():
                generator = torch.Generator().manual_seed(1_000_003 * seed + number)
                for part in at_most([batch], size):
                    _take_in(model, task, model.place(part), found, sums, generator)
            advance("")
    joined = {name: _joined(part, samples) for name, part in sums.items()}
    return {name: curvature for name, curvature in joined.items() if curvature.rows}


def _take_in(
    model: PrunableModel, task: Task, batch: Batch, found: Mapping[str, Reader], sums: Mapping[str, _Sums],
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Add one batch."""
    anchors: list[Tensor] = []
    hooks = [(reader.module, _watching(reader, batch, sums[name], anchors)) for name, reader in found.items()]
    with torch.enable_grad(), hooked(after=hooks):
        scalar = probe_of(task, model.logits(batch), batch, generator)
        if anchors and scalar.requires_grad:
            torch.autograd.grad(scalar, anchors, allow_unused=True)


def _watching(reader: Reader, batch: Batch, sums: _Sums, anchors: list[Tensor]) -> Callable[..., Tensor]:
    def hook(module: Any, args: Sequence[Tensor], output: Tensor) -> Tensor:
        sums.read(reader.rows(args[0].detach(), batch))
        anchor = output.new_zeros(()).requires_grad_()
        anchors.append(anchor)
        # weights take no gradient here: the graph begins at the anchors
        watched = output + anchor
        watched.register_hook(lambda gradient: sums.answered(reader.given(gradient, batch)))
        return watched

    return hook


def probe_of(task: Task, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """A scalar `<xi, logits>` whose xi has the Hessian of the task's divergence as covariance.

    For a task without distributions the divergence is the squared distance of the logits.
    """
    if isinstance(task, Probing):
        return task.probe(logits, batch, generator)
    if not isinstance(task, Distributing):
        return (random_signs(logits, generator) * logits.float()).sum()
    answers = task.distributions(logits, batch).float()
    shares = answers.detach().softmax(dim=-1)
    return (divergence_probe(shares, generator) * torch.where(shares > 0, answers, 0.0)).sum()


def _joined(part: _Sums, samples: int) -> Curvature:
    whole = summed({"inputs": part.inputs, "outputs": part.outputs, "rows": torch.tensor(part.rows)})
    rows = int(whole["rows"])
    return Curvature(whole["inputs"] / max(rows, 1), whole["outputs"] / max(rows, 1), rows / max(samples, 1))
