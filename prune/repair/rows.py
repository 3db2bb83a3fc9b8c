"""A consumer as a matrix product: the rows that it reads and gives, and where its weights stand.

Shapes: N rows (tokens that are no padding, or positions of an image), k columns that the consumer multiplies (input
features, or channels times the kernel's window), D outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from models.base import Batch, PrunableModel, UnitGroup
from models.slicing import EmptyConv2d
from prune.weights.statistics import tokens_of
from utils.errors import InputError


@dataclass(frozen=True)
class Reader:
    """A consumer read as `rows @ matrix + bias`.

    Attributes:
        name: Dotted name of the module.
        module: A linear or a convolution.
        groups: The unit groups that it reads.
    """

    name: str
    module: Any
    groups: tuple[UnitGroup, ...]

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return isinstance(self.module, nn.Conv2d | EmptyConv2d)

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def columns(self) -> int:
        """How many columns it multiplies, k."""
        return self.module.weight.numel() // max(1, self.outputs)

    @property
    def outputs(self) -> int:
        """How many features it gives, D."""
        return self.module.weight.shape[1 - self._weight_dim]

    def matrix(self) -> Tensor:
        """Its weight, (k, D), float64."""
        weight = self.module.weight.detach().double()
        return weight if self._weight_dim == 0 else weight.flatten(1).T

    def written(self, matrix: Tensor) -> Tensor:
        """A matrix (k, D) in the shape and type of its weight."""
        weight = self.module.weight
        return (matrix if self._weight_dim == 0 else matrix.T).reshape(weight.shape).to(weight.dtype)

    def rows(self, inputs: Tensor, batch: Batch, first: bool = False) -> Tensor:
        """What it multiplies, (N, k).

        Args:
            inputs: What the module reads.
            batch: Its attention mask tells padding.
            first: Only the first token of every sample.

        Where there are no columns, the number of rows means nothing.
        """
        if self.columns == 0:
            count = len(inputs) if first else int(inputs.shape[:-1].numel())
            return inputs.new_zeros(count, 0)
        if not self.convolves:
            return inputs[:, 0] if first else tokens_of(inputs, batch)
        conv = self.module
        windows = unfold(inputs, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (B, k, positions)
        return windows.transpose(1, 2).flatten(0, 1)  # (B * positions, k)

    def given(self, outputs: Tensor, batch: Batch, first: bool = False) -> Tensor:
        """What it gives, or is added to it, (N, D)."""
        if not self.convolves:
            return outputs[:, 0] if first else tokens_of(outputs, batch)
        return outputs.flatten(2).transpose(1, 2).flatten(0, 1)  # (B, D, h, w) -> (B * h * w, D)

    def units(self) -> Tensor:
        """Which unit each column belongs to, (k,) int64, units numbered through all groups; -1 for none."""
        window = self.columns // max(1, self.module.weight.shape[self._weight_dim])
        owner = torch.full((self.columns // max(1, window),), -1)
        start = 0
        for group in self.groups:
            numbers = torch.arange(start, start + group.count)[:, None].expand_as(group.consumer.index)
            owner[group.consumer.index.flatten()] = numbers.flatten()
            start += group.count
        return owner.repeat_interleave(window)

    @property
    def _weight_dim(self) -> int:
        return self.groups[0].consumer.weight_dim


def readers(model: PrunableModel, what: str) -> dict[str, Reader]:
    """All consumers of a model by name.

    Args:
        model: The model.
        what: The setting that asks, for messages.

    Raises:
        InputError: If one of them is a convolution that is no plain matrix product.
    """
    groups: dict[str, list[UnitGroup]] = {}
    for group in model.unit_groups():
        groups.setdefault(group.consumer.module, []).append(group)
    found = {n: Reader(n, model.network.get_submodule(n), tuple(g)) for n, g in groups.items()}
    for name, reader in found.items():
        if reader.convolves and (why := _not_plain(reader.module)):
            raise InputError(f"{what}: {name} of model={model.name} {why}, which is not covered")
    return found


def _not_plain(conv: Any) -> str | None:
    if getattr(conv, "groups", 1) != 1:
        return "is a grouped convolution"
    if isinstance(conv.padding, str):
        return f"has padding={conv.padding}"
    mode = getattr(conv, "padding_mode", "zeros")
    return None if mode == "zeros" else f"has padding_mode={mode}"


def kept_outputs(model: PrunableModel, kept: Mapping[str, Tensor], reader: Reader) -> Tensor:
    """Which outputs of a consumer are left, as positions in the dense one, ascending.

    Args:
        model: The dense model.
        kept: Kept units per group.
        reader: The dense consumer; where it also makes units of another group, outputs go with them.
    """
    left = torch.ones(reader.outputs, dtype=torch.bool)
    dim = 1 - reader.groups[0].consumer.weight_dim
    for group in model.unit_groups():
        gone = torch.ones(group.count, dtype=torch.bool)
        gone[kept[group.name]] = False
        for part in group.producers:
            if part.tensor == f"{reader.name}.weight" and part.dim == dim:
                left[part.index[gone].flatten()] = False
    return left.nonzero().flatten()
