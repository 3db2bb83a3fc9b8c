"""Families of timm by a row each: where the blocks lie, and what in a block is its attention and its MLPs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import models.timm_attention
import models.timm_layout
from models.base import Batch, Products, PrunableModel, Recipe, UnitGroup
from models.depth import keep_staged
from models.timm_attention import child
from models.timm_layout import (
    LAYOUTS,
    AttentionLayout,
    Layout,
    head_group,
    layout_of,
    neuron_group,
    runnable,
    why_uncovered,
)
from models.timm_models import write_stock
from utils.errors import InputError
from utils.training import Training

# indices and masks that older weights hold; a network makes them from its sizes
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")
TOKENS_STAY = "merging and dropping tokens are written for timm's VisionTransformer alone"


@dataclass(frozen=True)
class Whole:
    """An attention that is left whole, whose products still cost MACs.

    Attributes:
        attention: Dotted name with `*` for numbers.
        keys: Its linear that runs once for each key; `proj` runs once for each query.
    """

    attention: str
    keys: str


def nothing_odd(network: Any) -> None:
    """No part beside the blocks stands in the way of an exact cut."""


@dataclass(frozen=True)
class Family:
    """What a family of timm has to say.

    Attributes:
        network: Its class.
        blocks: Dotted name of its blocks with `*` for numbers, stage by stage.
        attention: Name of the attention in a block; None where there is none, or it is left whole.
        headless: Classes that may stand in the attention's place and have no heads.
        mlps: Names of the MLPs in a block.
        point: Name of what in a block shows the stream as it enters, for the trajectory; None takes the outputs.
        final: Norms behind the last block; the first that is one ends the trajectory.
        feature_axis: See `PrunableModel.feature_axis`.
        whole: Attentions that are left whole.
        layouts: Rows for layers of its own, beside those that timm's families share.
        odd: Says why a network as a whole can't be cut exactly; None if it can.
        tokens: Why no tokens of it can be merged or dropped.
    """

    network: type[nn.Module]
    blocks: str = "blocks.*"
    attention: str | None = "attn"
    headless: tuple[type[nn.Module], ...] = ()
    mlps: tuple[str, ...] = ("mlp",)
    point: str | None = "norm1"
    final: tuple[str, ...] = ("norm", "fc_norm")
    feature_axis: int = 1
    whole: tuple[Whole, ...] = ()
    layouts: tuple[Layout, ...] = ()
    odd: Callable[[Any], str | None] = nothing_odd
    tokens: str = TOKENS_STAY


class TimmFamily(PrunableModel):
    """Heads and neurons of a network from timm, where a family's row says that they lie.

    Attributes:
        family: The row.
    """

    code = (models.timm_attention, models.timm_layout)
    fixed_blocks = None

    def __init__(
        self, network: nn.Module, recipe: Recipe, training: Training | None = None, *, families: Sequence[Family]
    ) -> None:
        self.family = family_of(network, families, recipe)
        _make_cuttable(network, self.family, recipe.arguments["name"])
        super().__init__(network, recipe, training)

    @property
    def name(self) -> str:
        """Timm's name of the architecture."""
        return self.recipe.arguments["name"]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group of heads where a block's attention has them, and one of neurons for each of its MLPs."""
        found = []
        for layer, block in enumerate(self.blocks()):
            for name, layout in parts_of(self.network, block, self.family):
                if isinstance(layout, AttentionLayout):
                    found.append(head_group(self.network, block, layer, name, layout))
                elif layout is not None:
                    part = name.removeprefix(f"{block}.")
                    kind = "neurons" if len(self.family.mlps) == 1 else f"{part}.neurons"
                    found.append(neuron_group(self.network, block, layer, name, layout, kind))
        return tuple(found)

    def blocks(self) -> tuple[str, ...]:
        """Blocks from input to output, stage by stage."""
        return named(self.network, self.family.blocks)

    def feature_points(self) -> tuple[str, ...]:
        """What enters each block, then the final norm; or what each block gives."""
        if self.family.point is None:
            inner = self.blocks()
        else:
            inner = tuple(f"{block}.{self.family.point}" for block in self.blocks())
        norms = [n for n in self.family.final if not isinstance(self.network.get_submodule(n), nn.Identity)]
        last = self.blocks()[-1:] if self.family.point is not None else ()
        return (*inner, *(norms[:1] or last))

    @property
    def feature_axis(self) -> int:
        """Where maps of four dimensions have their features."""
        return self.family.feature_axis

    def whole_products(self) -> tuple[Products, ...]:
        """Products of the attentions that are left whole."""
        found = []
        for whole in self.family.whole:
            for name in named(self.network, whole.attention):
                width: Any = self.network.get_submodule(f"{name}.proj").in_features
                found.append(Products(f"{name}.proj", f"{name}.{whole.keys}", 2 * width))
        return tuple(found)

    def logits(self, batch: Batch) -> Tensor:
        """Class logits, (B, C)."""
        return self.network(batch["inputs"])

    @property
    def protected_tokens(self) -> int:
        """Class and register tokens."""
        return int(getattr(self.network, "num_prefix_tokens", 0))

    def why_not_mergeable(self) -> str | None:
        """No tokens of these families are merged."""
        return self.family.tokens

    def why_not_droppable(self) -> str | None:
        """No tokens of these families are dropped."""
        return self.family.tokens

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        keep_staged(self.network, self.blocks(), kept)

    def stock_files(self, folder: Path) -> str | None:
        """Timm can express the architecture as it is."""
        if len(self.blocks()) < self.dense_depth:
            return "timm states the depth of these families by the architecture"
        if any(group.count != self.dense_counts[group.name] for group in self.unit_groups()):
            return "timm has no argument for the heads or neurons of a single block"
        write_stock(self, folder, {})
        return None


def named(network: nn.Module, pattern: str) -> tuple[str, ...]:
    """Names of modules that a dotted pattern with `*` for numbers fits, in the network's order."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return tuple(name for name, _ in network.named_modules() if wanted.fullmatch(name))


def family_of(network: nn.Module, families: Sequence[Family], recipe: Recipe) -> Family:
    """The row of a network's class.

    Raises:
        InputError: If there is none.
    """
    found = next((family for family in families if type(network) is family.network), None)
    if found is None:
        known = ", ".join(family.network.__name__ for family in families)
        group = recipe.builder.rpartition(".")[2].removesuffix("_model")
        name = recipe.arguments["name"]
        raise InputError(f"model.name={name}: is a {type(network).__name__}; model={group} takes timm's {known}")
    return found


def parts_of(network: nn.Module, block: str, family: Family) -> list[tuple[str, Layout | None]]:
    """The parts of a block that have units: their names, and the rows of their classes (None: in no row)."""
    found: list[tuple[str, Layout | None]] = []
    for part in (family.attention, *family.mlps):
        module = None if part is None else child(network.get_submodule(block), part)
        if module is not None and not isinstance(module, family.headless):
            found.append((f"{block}.{part}", layout_of(module, (*family.layouts, *LAYOUTS))))
    return found


def _make_cuttable(network: nn.Module, family: Family, name: str) -> None:
    """Refuse what can't be cut exactly, and give attentions a forward that runs with any number of heads."""
    if why := family.odd(network):
        raise InputError(f"model.name={name}: cannot be cut exactly: {why}")
    for block in named(network, family.blocks):
        if not (parts := parts_of(network, block, family)):
            kind = type(network.get_submodule(block)).__name__
            raise InputError(f"model.name={name}: {block} cannot be cut: a {kind} has none of the parts in its row")
        for part, layout in parts:
            module = network.get_submodule(part)
            if why := why_uncovered(module, layout):
                raise InputError(f"model.name={name}: {part} cannot be cut exactly: {why}")
            if isinstance(layout, AttentionLayout):
                parent, _, leaf = part.rpartition(".")
                setattr(network.get_submodule(parent), leaf, runnable(module, layout))
