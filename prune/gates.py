"""Gates: one number a unit that multiplies what the unit's consumer reads.

A gate of zeros masks a unit; the gradient with respect to a gate of ones is the sum of
weight times gradient over the unit's columns of the consumer's weight, without storing
any weight gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data.base import DataBundle, Task
from models.base import Batch, PrunableModel, UnitGroup
from models.pretrained import samples_in, share_of
from prune.base import Plan
from utils.distributed import divided
from utils.errors import InputError
from utils.hooks import hooked
from utils.memory import Portions, rows_of
from utils.progress import progress_bar
from utils.seed import random_state_restored


@contextmanager
def gated(model: PrunableModel, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply every unit by its gate where its consumer reads it.

    Args:
        model: The model; hooks are installed for the block and removed after it.
        gates: Per unit group (count,); groups not named are left alone.
    """
    groups = [group for group in model.unit_groups() if group.name in gates and group.count]
    hooks = [
        (model.network.get_submodule(group.consumer.module), _gate_hook(group, gates[group.name], model.device))
        for group in groups
    ]
    with hooked(before=hooks):
        yield


def _gate_hook(group: UnitGroup, gate: Tensor, device: torch.device) -> Callable[..., Any]:
    index = group.consumer.index.to(device)  # (count, width)
    axis = group.consumer.channel_axis

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        channels = torch.ones(x.shape[axis], device=x.device, dtype=gate.dtype)
        values = gate.to(x.device)[:, None].expand_as(index).flatten()  # (count * width,)
        channels = channels.index_copy(0, index.flatten(), values).to(x.dtype)
        shape = [1] * x.ndim
        shape[axis] = -1
        return (x * channels.view(shape), *args[1:])

    return hook


def plan_gates(model: PrunableModel, plan: Plan) -> dict[str, Tensor]:
    """Ones for the units that a plan keeps, zeros for the others."""
    gates = {group.name: torch.zeros(group.count) for group in model.unit_groups()}
    for name, kept in plan.kept.items():
        gates[name][kept] = 1.0
    return gates


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without weight gradients, and leave no trace of it.

    Train/eval mode of every module, `requires_grad` and `grad` of every parameter and all
    random state are afterwards what they were.
    """
    modes = [(module, module.training) for module in network.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in network.parameters()]
    try:
        with random_state_restored():
            network.eval().requires_grad_(False)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed, grad in flags:
            parameter.requires_grad_(needed)
            parameter.grad = grad


def calibration_of(data: DataBundle) -> DataBundle:
    """Return the data if it has calibration batches.

    Raises:
        InputError: If there is none.
    """
    if not any(len(tensor) for batch in data.calibration for tensor in batch.values()):
        raise InputError(f"data={data.name}: the calibration set is empty; this method needs at least one sample")
    return data


def loss_gradients(
    model: PrunableModel, task: Task, batch: Batch, of: Sequence[Tensor], portions: Portions
) -> list[Tensor]:
    """Gradients of a batch's mean loss; where memory runs out, of parts of it, each weighed by its share of the mean.

    Args:
        model: The model.
        task: Whose loss.
        batch: On any device.
        of: What is differentiated by; takes gradients, and the loss depends on it. What it does not depend on (a gate
            of a unit behind an emptied layer) has a gradient of zero.
        portions: How many samples fit.
    """
    samples = samples_in(batch)

    def part(rows: range) -> list[Tensor]:
        placed = model.place(rows_of(batch, rows))
        share = share_of(task, placed, None if len(rows) == samples else batch)
        if not share:  # a mean over nothing
            return [torch.zeros_like(tensor) for tensor in of]
        with torch.enable_grad():
            loss = task.loss(model.logits(placed), placed)
            found = torch.autograd.grad(loss, list(of), materialize_grads=True)
        return [*found] if len(rows) == samples else [gradient * share for gradient in found]

    parts = portions.each(samples, part)
    sums = next(parts)
    for values in parts:
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums


def gate_gradients(model: PrunableModel, data: DataBundle, title: str) -> dict[str, Tensor]:
    """Gradient of each calibration batch's mean loss with respect to every gate, at one.

    Args:
        model: The dense model; left exactly as it was.
        data: Source of the calibration batches and of the loss.
        title: Label of the progress bar.

    Returns:
        Per unit group (batches, count), float32, CPU.
    """
    batches = calibration_of(data).calibration
    gates = {
        group.name: torch.ones(group.count, device=model.device, requires_grad=True)
        for group in model.unit_groups()
        if group.count
    }
    if not gates:
        return {group.name: torch.zeros(len(batches), 0) for group in model.unit_groups()}
    portions = Portions(title)
    with undisturbed(model.network), gated(model, gates), progress_bar(title, len(batches)) as advance:

        def gradients(batch: Batch) -> tuple[dict[str, Tensor], None]:
            values = loss_gradients(model, data.task, batch, list(gates.values()), portions)
            advance("")
            return dict(zip(gates, values, strict=True)), None

        found = [tensors for tensors, _ in divided(batches, gradients)]
    result = {name: torch.stack([tensors[name] for tensors in found]).float().cpu() for name in gates}
    return {g.name: result.get(g.name, torch.zeros(len(batches), 0)) for g in model.unit_groups()}
