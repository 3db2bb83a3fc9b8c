"""Vision transformers from timm: DeiT, ViT and their kin with one qkv projection a block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

import models.keeping_flow
import models.merging
import models.merging_flow
import models.vit_merging
from models.base import Attribute, Batch, Consumer, Emptied, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.depth import keep_listed
from models.keeping import Keeping
from models.merging import Reduction
from models.timm_models import assembled, write_stock
from models.vit_merging import ReducingAttention, dropping, merging, reads_front, why_not_mergeable
from utils.errors import InputError
from utils.rules import Count, ExistingPath, checked
from utils.training import Training


class ViT(PrunableModel):
    """Heads of the fused qkv and MLP neurons as unit groups."""

    network: VisionTransformer
    code = (models.merging, models.merging_flow, models.vit_merging, models.keeping_flow)
    fixed_blocks = None

    def __init__(self, network: nn.Module, recipe: Recipe, training: Training | None = None) -> None:
        refuse_uncovered(network, recipe.arguments["name"])
        super().__init__(network, recipe, training)

    @property
    def name(self) -> str:
        """Timm's name of the architecture."""
        return self.recipe.arguments["name"]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group of heads and one of neurons a block."""
        pairs = ((self._heads(i), self._neurons(i)) for i in range(len(self.network.blocks)))
        return tuple(group for pair in pairs for group in pair)

    def blocks(self) -> tuple[str, ...]:
        """Blocks from input to output."""
        return tuple(f"blocks.{i}" for i in range(len(self.network.blocks)))

    def feature_points(self) -> tuple[str, ...]:
        """First norm of each block, then the final norm."""
        final = ("norm",) if not isinstance(self.network.norm, nn.Identity) else ("fc_norm",)
        return (*(f"{block}.norm1" for block in self.blocks()), *final)

    def logits(self, batch: Batch) -> Tensor:
        """Class logits, (B, C)."""
        return self.network(batch["inputs"])

    @property
    def protected_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return self.network.num_prefix_tokens

    def why_not_mergeable(self) -> str | None:
        """Pooling must count a merged token by its size."""
        return why_not_mergeable(self.network)

    def why_not_droppable(self) -> str | None:
        """Pooling must leave out tokens that are gone."""
        return why_not_mergeable(self.network)

    @property
    def class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.network.has_class_token

    @property
    def reads_front(self) -> bool:
        """Whether the class token, or it and the distillation token, are all that the head reads."""
        return reads_front(self.network)

    def _drop_tokens(self, keeping: Keeping) -> None:
        self.network = dropping(self.network, keeping)

    def _merge_tokens(self, reduction: Reduction) -> None:
        self.network = merging(self.network, reduction)

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        keep_listed(self.network, self.blocks(), kept)

    def stock_files(self, folder: Path) -> str | None:
        """Timm can express any depth, one MLP width for all blocks, and every head of the architecture."""
        if self.reduction is not None and self.reduction.merges:
            return f"timm cannot express {'dropped' if isinstance(self.reduction, Keeping) else 'merged'} tokens"
        if any(group.count != self.dense_counts[group.name] for group in self.unit_groups() if group.kind == "head"):
            return "timm has no argument for fewer heads of the same width"
        neurons = {group.name: group.count for group in self.unit_groups() if group.kind == "neuron"}
        widths = sorted(set(neurons.values()))
        depth = {"depth": len(self.blocks())} if len(self.blocks()) < self.dense_depth else {}
        if all(count == self.dense_counts[name] for name, count in neurons.items()):
            write_stock(self, folder, depth)
            return None
        if len(widths) > 1 or 0 in widths:
            return f"timm has one MLP width for all blocks, here they are {', '.join(map(str, widths))}"
        if not isinstance(self.network.blocks[0].mlp, Mlp):  # type: ignore[union-attr]
            return "timm's mlp_ratio does not state the width of a gated MLP"
        # half a neuron more, so that timm's int() of the product never falls one short
        write_stock(self, folder, {"mlp_ratio": (widths[0] + 0.5) / self.network.embed_dim, **depth})
        return None

    def _heads(self, layer: int) -> UnitGroup:
        name = f"blocks.{layer}.attn"
        attention = self.network.get_submodule(name)
        count, width = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        span, index = count * width, unit_index(count, width)
        gate = rows(self.network, f"{name}.gate", index) if getattr(attention, "gate", None) is not None else ()
        in_front = isinstance(attention, ReducingAttention) and attention.flow.in_front(layer)
        return UnitGroup(
            name=f"blocks.{layer}.heads",
            kind="head",
            layer=layer,
            count=count,
            width=width,
            producers=(*rows(self.network, f"{name}.qkv", unit_index(count, width, 0, span, 2 * span)), *gate),
            consumer=Consumer(f"{name}.proj", -1, index),
            after_cut=(Attribute(name, "num_heads"), Attribute(name, "attn_dim", per_unit=width)),
            emptied=Emptied(name, unfused),
            pairwise_features=2 * width,
            keys_from=f"{name}.qkv" if in_front else None,
            key_weights=2 * width * self.network.embed_dim,
            query_weights=width * self.network.embed_dim if in_front else 0,
        )

    def _neurons(self, layer: int) -> UnitGroup:
        name = f"blocks.{layer}.mlp"
        mlp = self.network.get_submodule(name)
        count = int(mlp.fc2.in_features)  # type: ignore[union-attr,arg-type]
        index = unit_index(count, 1)
        if isinstance(mlp, GluMlp):  # gate and value lie one after the other in one tensor
            producers = rows(self.network, f"{name}.fc1", unit_index(count, 1, 0, count))
        elif isinstance(mlp, SwiGLU):
            producers = tuple(p for part in ("fc1_g", "fc1_x") for p in rows(self.network, f"{name}.{part}", index))
        else:
            producers = rows(self.network, f"{name}.fc1", index)
        return UnitGroup(
            name=f"blocks.{layer}.neurons",
            kind="neuron",
            layer=layer,
            count=count,
            width=1,
            producers=producers,
            consumer=Consumer(f"{name}.fc2", -1, index),
        )


def unfused(attention: Any) -> nn.Module:
    """The same attention by plain products: torch 2.11 divides by the number of heads in its fused one."""
    attention.fused_attn = False
    return attention


def refuse_uncovered(network: nn.Module, name: str) -> None:
    """Raise an InputError that names the first part of a network that this adapter can't cut exactly."""
    if not isinstance(network, VisionTransformer):
        raise InputError(f"model.name={name}: is a {type(network).__name__}; model=vit takes timm's VisionTransformer")
    for layer, block in enumerate(network.blocks):
        if why := _uncovered(block):
            raise InputError(f"model.name={name}: block {layer} cannot be cut exactly: {why}")


def _uncovered(block: nn.Module) -> str | None:
    """Why a block is not covered, or None."""
    if type(block) not in (Block, ResPostBlock):
        return f"{type(block).__name__} has no attention and MLP of its own kind one after the other"
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention:
        return f"its attention is a {type(attention).__name__}, not timm's Attention with one qkv projection"
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"its MLP is a {type(mlp).__name__}; Mlp, GluMlp and SwiGLU are covered"
    if not isinstance(attention.norm, nn.Identity):
        return "scale_attn_norm normalises over all heads before they are projected"
    if not isinstance(mlp.norm, nn.Identity):
        return "scale_mlp_norm normalises over all neurons before they are read"
    return None


@checked
def vit(
    *,
    name: str,
    classes: Count | None = None,
    image_size: Count | None = None,
    pretrained: bool = False,
    checkpoint: ExistingPath | None = None,
    new_head: bool = False,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> ViT:
    """Build any of timm's VisionTransformers.

    Args:
        name: timm's name, such as `deit_small_patch16_224`.
        classes: Width of the classifier; None takes the architecture's own.
        image_size: Side of the images in pixels; None takes the architecture's own.
        pretrained: Take the weights that timm publishes under the name, from the hub.
        checkpoint: A `.safetensors` or `.pth` file, or a folder; wins over `pretrained`.
        new_head: Put a fresh classifier on the loaded weights and train on first use.
        settings: Further arguments of timm's model, such as `depth`.
        training: How to train where the weights are not complete.

    Raises:
        InputError: If timm does not know the name, a block can't be cut exactly, or
            weights are missing or don't fit.
    """
    arguments = {"name": name, "classes": classes, "image_size": image_size, "settings": dict(settings or {})}
    return assembled(
        ViT, Recipe("models.vit.vit", arguments, exact_name=True),
        pretrained=pretrained, checkpoint=checkpoint, new_head=new_head, training=training,
    )  # fmt: skip
