"""The nouns of a network that can be pruned: its unit groups, and the model that owns them."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from models.depth import refuse_bad_blocks
from models.keeping import Keeping
from models.merging import Reduction
from utils.code import code_hash
from utils.errors import InputError
from utils.hooks import is_hooked

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Slices:
    """Where a group's units lie along one dimension of one parameter or buffer.

    Attributes:
        tensor: Dotted name in the network.
        dim: The dimension that is sliced.
        index: Positions of each unit, (count, positions per unit), int64. Several ranges of
            one tensor are simply more positions: a head has three in a fused qkv.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Consumer:
    """The one linear or convolution that reads a group's units.

    Attributes:
        module: Dotted name in the network.
        channel_axis: Axis of its input that holds the units: -1 for a linear, 1 for a convolution.
        index: Input positions of each unit, (count, width), int64.
        weight_dim: Dimension of its weight that matches the channel axis.
    """

    module: str
    channel_axis: int
    index: Tensor
    weight_dim: int = 1

    @property
    def slices(self) -> Slices:
        """The part of the consumer's weight that goes when a unit goes."""
        return Slices(f"{self.module}.weight", self.weight_dim, self.index)


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps about its units: `fixed + per_unit * kept` after a cut."""

    module: str
    name: str
    per_unit: int = 1
    fixed: int = 0


@dataclass(frozen=True)
class Emptied:
    """What stands in for a module that cannot run without units: `make(module)`, once all are gone."""

    module: str
    make: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class UnitGroup:
    """Equal units that can be removed from one place of a network.

    Attributes:
        name: Unique name, such as `blocks.3.heads`.
        kind: What a unit is: `head`, `neuron`, `channel`.
        layer: Position of its block, from 0.
        count: Number of units.
        width: Features per unit at the consumer.
        producers: Every slice that makes the units, over parameters and buffers.
        consumer: The module that reads them.
        after_cut: Attributes to set once units have gone.
        emptied: Replaces a module once the last unit has gone; None where it runs without.
        pairwise_features: Features per unit in token-by-token products: for a head
            `2 * head width`, once for the attention scores and once for the weighted sum.
        keys_per_query: Tokens that each token attends to; None means all of them.
        keys_from: Dotted name of a linear that runs once for each token attended to, where these are others.
        key_weights: Weights per unit that make keys and values, biases not counted; 0 where it is not known.
        query_weights: Weights per unit that make queries, and run for queries alone, inside the linear `keys_from`.
    """

    name: str
    kind: str
    layer: int
    count: int
    width: int
    producers: tuple[Slices, ...]
    consumer: Consumer
    after_cut: tuple[Attribute, ...] = ()
    emptied: Emptied | None = None
    pairwise_features: int = 0
    keys_per_query: int | None = None
    keys_from: str | None = None
    key_weights: int = 0
    query_weights: int = 0

    @property
    def slices(self) -> tuple[Slices, ...]:
        """All slices that go when units go, the consumer's included."""
        return (*self.producers, self.consumer.slices)


def unit_index(count: int, width: int, *offsets: int) -> Tensor:
    """Positions of `count` adjacent units of `width` features.

    Args:
        count: Number of units.
        width: Features per unit.
        offsets: Where each range of units starts; none given means one range at 0.

    Returns:
        Positions, (count, width * ranges), int64.
    """
    first = torch.arange(count * width).view(count, width)
    return torch.cat([first + offset for offset in offsets or (0,)], dim=1)


def rows(network: nn.Module, module: str, index: Tensor) -> tuple[Slices, ...]:
    """Slices on dim 0 of all that a linear, convolution or norm holds per output feature."""
    owner = network.get_submodule(module)
    names = ("weight", "bias", "running_mean", "running_var")
    held = [name for name in names if getattr(owner, name, None) is not None]
    return tuple(Slices(f"{module}.{name}", 0, index) for name in held)


@dataclass(frozen=True)
class Recipe:
    """How a model was built: the builder's dotted name and its plain arguments.

    Attributes:
        builder: Dotted name of the function.
        arguments: What it is called with, as plain values.
        exact_name: Whether the argument `name` decides the architecture, so that a checkpoint
            saved under another one is refused.
    """

    builder: str
    arguments: Mapping[str, Any]
    exact_name: bool = False


@dataclass(frozen=True)
class Products:
    """Token-by-token products of an attention that is left whole, so that no unit group counts them.

    Attributes:
        queries: Dotted name of a linear or convolution that runs once for each query.
        keys: Dotted name of one that runs once for each key; called once, it serves every call for queries.
        features: MACs of a pair.
    """

    queries: str
    keys: str
    features: int


class PrunableModel(ABC):
    """A network together with where its units live; one final subclass a family.

    Attributes:
        network: The module that computes logits.
        recipe: How to build the dense network again.
        dense_counts: Units per group in the dense network.
        origin: Per unit group, which units of the dense network are left, (kept,).
        dense_depth: Blocks of the dense network.
        block_origin: Which of them are left.
        training: How to obtain weights on first use; None where there is no recipe for it.
        has_weights: Whether the weights came with the model, from a checkpoint or a hub.
        preprocessing: What turns raw text or images into this model's inputs; None where
            the data comes as tensors.
        notes: What a reader should know of how it was made; shown above the numbers.
        reduction: How its tokens are merged or dropped on their way; None where all of them go through.
        sparse: Whether zeros in the linears of its blocks were put there by pruning, and so stay.
        visited: The device that its blocks come to for their own forward, while they lie in main memory;
            None where all of it lies in one place.
        biased: Whether modules were given a bias that their family has not.
        code: Modules beside the family's own that its outputs come from.
        chained: Whether what a block gives is read by the next block alone.
        fixed_blocks: Why none of the family's blocks can be removed; None if they can.
    """

    code: ClassVar[tuple[ModuleType, ...]] = ()
    chained: ClassVar[bool] = True
    fixed_blocks: ClassVar[str | None] = "its blocks are not known to keep the shape of what flows through them"

    def __init__(self, network: nn.Module, recipe: Recipe, training: Any = None) -> None:
        self.network = network.eval()
        self.recipe = recipe
        self.training = training
        self.has_weights = False
        self.preprocessing: Any = None
        self.notes: list[str] = []
        self.reduction: Reduction | Keeping | None = None
        self.visited: torch.device | None = None
        self.sparse = False
        self.biased = False
        self.dense_counts = {group.name: group.count for group in self.unit_groups()}
        self.origin = {name: torch.arange(count) for name, count in self.dense_counts.items()}
        self.dense_depth = len(self.blocks())
        self.block_origin = tuple(range(self.dense_depth))

    @abstractmethod
    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """Describe the units that the network has now."""

    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in execution order."""

    @abstractmethod
    def feature_points(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are the model's trajectory."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Run the network on a batch; shape of the result depends on the task."""

    @property
    def feature_axis(self) -> int:
        """Axis of the features in what feature points and blocks give as maps of four dimensions."""
        return 1

    def whole_products(self) -> tuple[Products, ...]:
        """What attentions cost that no unit group describes."""
        return ()

    @property
    def protected_tokens(self) -> int:
        """Tokens in front that are never merged: class, distillation and register tokens."""
        return 0

    def why_not_mergeable(self) -> str | None:
        """Why its tokens can't be merged, in one line; None if they can."""
        return "it has no tokens that can be merged"

    @property
    def class_token(self) -> bool:
        """Whether the first token is the one that the answer is read from."""
        return False

    @property
    def reads_front(self) -> bool:
        """Whether the answer depends on the protected tokens alone of what the last block gives."""
        return False

    def special_tokens(self) -> tuple[int, ...]:
        """Token ids that are never dropped, beside the tokens in front."""
        return ()

    def why_not_droppable(self) -> str | None:
        """Why its tokens can't be dropped, in one line; None if they can."""
        return "it has no tokens that can be dropped"

    def never_dropped(self, example: Batch) -> int:
        """How many tokens of one sample are never dropped."""
        return self.protected_tokens

    def reduce_tokens(self, reduction: Reduction | Keeping) -> None:
        """Merge or drop tokens from now on, in place; an earlier schedule is replaced.

        Names of modules and tensors stay. A family whose tokens can be merged overrides `_merge_tokens`,
        one whose tokens can be dropped `_drop_tokens`.

        Raises:
            InputError: If tokens of this model can't go that way, or the schedule has not one entry a block.
        """
        merges = isinstance(reduction, Reduction)
        if reason := self.why_not_mergeable() if merges else self.why_not_droppable():
            raise InputError(f"model={self.name}: {reason}")
        reduction.refuse_misfit(len(self.blocks()))
        if isinstance(reduction, Reduction) and reduction.importance and not self.class_token:
            raise InputError(f"importance={reduction.importance}: must be 0 for a model without a class token")
        if isinstance(reduction, Reduction) and reduction.front_only and not self.reads_front:
            raise InputError(
                "front_only=True: must be false for a model whose head reads more than the tokens in front"
            )
        if isinstance(reduction, Reduction):
            self._merge_tokens(reduction)
        else:
            self._drop_tokens(reduction)
        self.reduction = reduction

    def _merge_tokens(self, reduction: Reduction) -> None:
        raise NotImplementedError(f"{type(self).__name__} says that its tokens can be merged, and does not say how")

    def _drop_tokens(self, keeping: Keeping) -> None:
        raise NotImplementedError(f"{type(self).__name__} says that its tokens can be dropped, and does not say how")

    def why_blocks_stay(self) -> str | None:
        """Why no block of it can be removed, in one line; None if they can."""
        merging = "its tokens are merged on their way by a schedule for its blocks as they are; remove blocks first"
        return self.fixed_blocks or (merging if self.reduction is not None else None)

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Remove blocks, in place; those left, and their units, are named by their new positions.

        A family whose blocks can go overrides `_keep_blocks`.

        Args:
            kept: Positions of those that stay, ascending.

        Raises:
            InputError: If blocks of this model can't go.
            ValueError: If the positions are not such, or all would go.
        """
        if reason := self.why_blocks_stay():
            raise InputError(f"model={self.name}: no block can be removed: {reason}")
        refuse_bad_blocks(kept, len(self.blocks()))
        before = [group.name for group in self.unit_groups() if group.layer in kept]
        self._keep_blocks(kept)
        names = dict(zip(before, (group.name for group in self.unit_groups()), strict=True))
        self.origin = {new: self.origin[old] for old, new in names.items()}
        self.dense_counts = {new: self.dense_counts[old] for old, new in names.items()}
        self.block_origin = tuple(self.block_origin[position] for position in kept)

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        raise NotImplementedError(f"{type(self).__name__} says that its blocks can be removed, and does not say how")

    def stock_files(self, folder: Path) -> str | None:
        """Write what the family's own library needs beside the weights to load them.

        Args:
            folder: Where `model.safetensors` lies.

        Returns:
            Why that library cannot express the network's shapes, in one line; None if it can.
        """
        return f"{self.name} is pare's own network"

    @property
    def name(self) -> str:
        """Short name for folders and reports."""
        return self.recipe.builder.rpartition(".")[2]

    @property
    def attention(self) -> str | None:
        """How attention is computed, such as `sdpa` or `eager`; None where the family does not choose."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model computes, and inputs go."""
        return self.visited or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating type."""
        return next(self.network.parameters()).dtype

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names that checkpoints of the family have."""
        return dict(tensors)

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint under the network's own names."""
        return dict(tensors)

    def copy(self) -> Self:
        """Copy the network; refused while hooks are installed, which a copy would carry along."""
        if is_hooked(self.network):
            raise RuntimeError("the network carries hooks; leave their context before copying it")
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network)
        twin.origin = dict(self.origin)
        return twin

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the model's device, floating inputs to its dtype; labels keep theirs."""
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        inputs = {k: t.to(self.dtype) for k, t in moved.items() if t.is_floating_point() and k != "labels"}
        return moved | inputs

    def fingerprint(self) -> str:
        """Hash of every weight and buffer with its name, the builder, how tokens merge, and which blocks are left."""
        digest = hashlib.sha256(self.recipe.builder.encode())
        if self.reduction is not None:
            digest.update(repr(self.reduction).encode())
        if isinstance(self.reduction, Keeping):
            digest.update(code_hash(type(self.reduction.rule)).encode())
        if len(self.block_origin) < self.dense_depth:
            digest.update(repr(self.block_origin).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
