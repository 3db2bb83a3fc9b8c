"""The neurons of a model's MLPs: the rows that make them, the columns that read them, and what they give."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import Batch, PrunableModel, UnitGroup
from prune.passes import in_fitting_batches, watch_calibration
from prune.weights.statistics import SquaredNorms, tokens_of
from utils.hooks import Hook

NEURON = "neuron"


def neuron_groups(model: PrunableModel) -> list[UnitGroup]:
    """The groups of neurons that have any left."""
    return [group for group in model.unit_groups() if group.kind == NEURON and group.count]


def rows_of(network: nn.Module, group: UnitGroup) -> list[Tensor]:
    """What makes each neuron: one matrix (N, I) for each row that it has in a weight, biases left out.

    Gate and up projection are two, whether they are two tensors or two halves of one; an MLP
    without a gate has one.
    """
    parameters, found = dict(network.named_parameters(remove_duplicate=False)), []
    for part in group.producers:
        if part.tensor in parameters and parameters[part.tensor].ndim > 1:
            weight = parameters[part.tensor].detach().movedim(part.dim, 0).flatten(1)  # (outputs, I)
            found += [weight[positions.to(weight.device)] for positions in part.index.T]
    return found


def columns_of(network: nn.Module, group: UnitGroup) -> Tensor:
    """What reads each neuron, (N, O)."""
    part = group.consumer.slices
    weight = network.get_parameter(part.tensor).detach().movedim(part.dim, 0)  # (inputs, O)
    return weight[part.index.to(weight.device)].flatten(1)  # (N, width, O) -> (N, width * O)


def given_norms(model: PrunableModel, data: DataBundle, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """L2 norm of what each neuron gives its reader, over all tokens of all calibration batches but padding.

    One pass; sums of squares, so that neither the batch size nor padding matters.

    Returns:
        Per group (N,), float32.
    """
    sums = in_fitting_batches(data, "neurons", lambda data: _sums_of_squares(model, data, groups))
    for group in groups:
        sums[group.name].join()
    return {group.name: _total(sums[group.name])[_positions(group)] for group in groups}


def _sums_of_squares(model: PrunableModel, data: DataBundle, groups: Sequence[UnitGroup]) -> dict[str, SquaredNorms]:
    sums = {group.name: SquaredNorms() for group in groups}
    current: Batch = {}

    def watch(group: UnitGroup) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[group.name].add(tokens_of(args[0], current), len(args[0]))

        return model.network.get_submodule(group.consumer.module), hook

    def start(batch: Batch) -> None:
        current.clear()
        current.update(batch)

    watch_calibration(model, data, "neurons", start, before=[watch(group) for group in groups], divided=True)
    return sums


def _total(found: SquaredNorms) -> Tensor:
    return found.norms().cpu() * sqrt(found.tokens)


def _positions(group: UnitGroup) -> Tensor:
    return torch.squeeze(group.consumer.index, dim=1)  # (N, 1) -> (N,)
