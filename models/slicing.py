"""Removing units from a network for real: slice every tensor that holds them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.base import UnitGroup


class EmptyConv2d(nn.Module):
    """A convolution left without input or output channels: it yields its bias, or nothing.

    torch's own raises without output channels, and without input channels returns none
    either. Keeps (empty) weight and bias under the convolution's names, for checkpoints.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.window = (conv.kernel_size, conv.stride, conv.dilation)
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W') with the sizes of the convolution; C or C' is 0."""
        size = [self._length(axis, length) for axis, length in enumerate(x.shape[2:])]
        out = x.new_zeros(len(x), len(self.weight), *size)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _length(self, axis: int, length: int) -> int:
        kernel, stride, dilation = (int(setting[axis]) for setting in self.window)
        reach = dilation * (kernel - 1)
        if self.padding == "same":
            return length
        padding = 0 if isinstance(self.padding, str) else int(self.padding[axis])
        return (length + 2 * padding - reach - 1) // stride + 1


class EmptyBatchNorm2d(nn.Module):
    """A batch norm left without channels; keeps its (empty) tensors under the norm's names."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 0, H, W) as it is."""
        return x


def keep_units(network: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
    """Remove, in place, every unit that is not kept.

    Args:
        network: The module to shrink.
        groups: All unit groups of the network; those not named in `kept` stay whole.
        kept: Ascending unit indices per group name, (kept,).

    Raises:
        ValueError: If a group is unknown, an index out of range, or a tensor is tied to
            one that the cut leaves whole.
    """
    _refuse_bad_indices(groups, kept)
    cut = [group for group in groups if group.name in kept and len(kept[group.name]) < group.count]
    _refuse_ties(network, cut)
    for (name, dim), gone in _removed_positions(cut, kept).items():
        _drop(network, name, dim, gone)
    for group in cut:
        for attribute in group.after_cut:
            value = attribute.fixed + attribute.per_unit * len(kept[group.name])
            setattr(network.get_submodule(attribute.module), attribute.name, value)
    for module_name in {s.tensor.rpartition(".")[0] for group in cut for s in group.slices}:
        _match_sizes(network, module_name)
    for group in cut:
        if group.emptied is not None and len(kept[group.name]) == 0:
            module = network.get_submodule(group.emptied.module)
            _replace(network, group.emptied.module, group.emptied.make(module))


def _refuse_bad_indices(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
    counts = {group.name: group.count for group in groups}
    for name, index in kept.items():
        if name not in counts:
            raise ValueError(f"kept names group {name!r}; the network has {', '.join(counts)}")
        values = index.tolist()
        if values != sorted(set(values)) or not all(0 <= i < counts[name] for i in values):
            raise ValueError(f"kept[{name!r}] is {values}; it must ascend without repeats in [0, {counts[name]})")


def _refuse_ties(network: nn.Module, groups: Sequence[UnitGroup]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in network.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    for part in (part for group in groups for part in group.slices):
        aliases = names.get(id(_tensor(network, part.tensor)), [])
        if len(aliases) > 1:
            raise ValueError(f"{' and '.join(aliases)} are tied: cutting one would change the other")


def _removed_positions(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """Positions to drop per (tensor, dim); groups that share a dimension are joined."""
    removed: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        gone = torch.ones(group.count, dtype=torch.bool)
        gone[kept[group.name]] = False
        for part in group.slices:
            removed[part.tensor, part.dim].append(part.index[gone].flatten())
    return {where: torch.cat(positions) for where, positions in removed.items()}


def _drop(network: nn.Module, name: str, dim: int, gone: Tensor) -> None:
    """Drop positions along one dimension of one tensor."""
    old = _tensor(network, name)
    keep = torch.ones(old.shape[dim], dtype=torch.bool)
    keep[gone] = False
    new = old.detach().index_select(dim, keep.nonzero().flatten().to(old.device)).clone()
    tensor = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    module, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(module), leaf, tensor)


def _tensor(network: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(module), leaf)


def _match_sizes(network: nn.Module, name: str) -> None:
    """Set the sizes that torch's own modules keep beside their weights."""
    module = network.get_submodule(name)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
        if 0 in module.weight.shape[:2]:
            _replace(network, name, EmptyConv2d(module))
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))
        if module.num_features == 0:
            _replace(network, name, EmptyBatchNorm2d(module))


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module.train(network.training))
