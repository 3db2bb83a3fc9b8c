"""A small pre-norm transformer encoder over image patches or given token vectors.

Shapes: B samples, T tokens (CLS included), D width, H heads, dh head width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import models.keeping_flow
import models.merging
import models.merging_flow
from models.base import Attribute, Batch, Consumer, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.checkpoint import load_weights, stored_recipe
from models.depth import keep_listed
from models.keeping import Keeping
from models.keeping_flow import KeepingFlow
from models.merging import Reduction
from models.merging_flow import Flow
from models.recast import recast
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Ratio, checked
from utils.training import Training


class Patches(nn.Module):
    """Cut an image into patches and embed each one."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, height, width) to (B, patches, D)."""
        return self.project(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention whose softmax scale outlives the removal of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.scale = self.head_width**-0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self._mixed(*self._projected(x, x))

    def _projected(self, x: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.heads, self.head_width)
        q, k, v = (
            project(tokens).unflatten(-1, shape).transpose(1, 2)  # (B, T, H*dh) -> (B, H, T, dh)
            for project, tokens in ((self.query, asking), (self.key, x), (self.value, x))
        )
        return q, k, v

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mixed = self._attended(q, k, v, bias)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, T, dh) -> (B, T, H*dh)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if q.shape[1] == 0:  # torch 2.11 divides by the number of heads
            return q
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)


class ReducingAttention(Attention):
    """The same attention among tokens of which some are merged or gone; the flow mixes them."""

    flow: Flow | KeepingFlow

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, Q, D), for the Q tokens that are asked for."""
        q, k, v = self._projected(x, self.flow.asking(x))
        mixed = self.flow.attend(q, k, v, self.scale, lambda bias: self._attended(q, k, v, bias))
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, Q, dh) -> (B, Q, H*dh)


class Block(nn.Module):
    """One pre-norm encoder layer: attention, then a two-layer MLP."""

    def __init__(self, width: int, heads: int, neurons: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, neurons), nn.Linear(neurons, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.fc2(gelu(self.fc1(self.norm2(x)))))


class ReducingBlock(Block):
    """The same layer, with fewer tokens from one of its halves on."""

    flow: Flow | KeepingFlow
    layer: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T - r, D), or to (B, Q, D) where it asks for the tokens in front alone."""
        x = self.flow.enter(x, self.layer)
        x = self.flow.asking(x) + self.dropout(self.attention(self.norm1(x)))
        x = self.flow.leave_attention(x)
        return self.flow.leave(x + self.dropout(self.fc2(gelu(self.fc1(self.norm2(x))))))


class Encoder(nn.Module):
    """Embedding, CLS token, learned positions, blocks, final norm, classifier on CLS."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, blocks: list[Block], classes: int) -> None:
        super().__init__()
        self.embed = embed
        # as large as the normalised tokens: with tiny positions attention starts blind to place
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, h, w) or tokens (B, T-1, token width) to logits (B, C)."""
        x = self.embed(x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ToyEncoder(PrunableModel):
    """Heads and MLP neurons of the toy encoder as unit groups."""

    network: Encoder
    code = (models.merging, models.merging_flow, models.keeping_flow)
    fixed_blocks = None

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group of heads and one of neurons a block."""
        pairs = ((self._heads(i), self._neurons(i)) for i in range(len(self.network.blocks)))
        return tuple(group for pair in pairs for group in pair)

    def blocks(self) -> tuple[str, ...]:
        """Blocks from input to output."""
        return tuple(f"blocks.{i}" for i in range(len(self.network.blocks)))

    def feature_points(self) -> tuple[str, ...]:
        """First norm of each block, then the final norm."""
        return (*(f"{block}.norm1" for block in self.blocks()), "norm")

    def logits(self, batch: Batch) -> Tensor:
        """Class logits, (B, C)."""
        return self.network(batch["inputs"])

    @property
    def protected_tokens(self) -> int:
        """The CLS token."""
        return 1

    @property
    def class_token(self) -> bool:
        """The answer is read from the CLS token."""
        return True

    @property
    def reads_front(self) -> bool:
        """The answer is read from the CLS token alone."""
        return True

    def why_not_mergeable(self) -> None:
        """It reads its answer from the CLS token alone."""

    def why_not_droppable(self) -> None:
        """It reads its answer from the CLS token alone."""

    def _merge_tokens(self, reduction: Reduction) -> None:
        self._reduce(Flow(reduction, self.protected_tokens))

    def _drop_tokens(self, keeping: Keeping) -> None:
        self._reduce(KeepingFlow(keeping, self.protected_tokens))

    def _reduce(self, flow: Flow | KeepingFlow) -> None:
        for layer, block in enumerate(self.network.blocks):
            self.network.blocks[layer] = reducing = recast(block, ReducingBlock, flow=flow, layer=layer)
            reducing.attention = recast(block.attention, ReducingAttention, flow=flow)  # type: ignore[arg-type]

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        keep_listed(self.network, self.blocks(), kept)

    def _heads(self, layer: int) -> UnitGroup:
        name = f"blocks.{layer}.attention"
        attention = self.network.get_submodule(name)
        count, width = int(attention.heads), int(attention.head_width)  # type: ignore[arg-type]
        index = unit_index(count, width)
        in_front = isinstance(attention, ReducingAttention) and attention.flow.in_front(layer)
        return UnitGroup(
            name=f"blocks.{layer}.heads",
            kind="head",
            layer=layer,
            count=count,
            width=width,
            producers=tuple(
                part
                for projection in ("query", "key", "value")
                for part in rows(self.network, f"{name}.{projection}", index)
            ),
            consumer=Consumer(f"{name}.out", -1, index),
            after_cut=(Attribute(name, "heads"),),
            pairwise_features=2 * width,
            keys_from=f"{name}.key" if in_front else None,
            key_weights=2 * width * self.network.norm.weight.numel(),
        )

    def _neurons(self, layer: int) -> UnitGroup:
        block = f"blocks.{layer}"
        count = self.network.get_submodule(f"{block}.fc1").out_features
        index = unit_index(int(count), 1)  # type: ignore[arg-type]
        return UnitGroup(
            name=f"{block}.neurons",
            kind="neuron",
            layer=layer,
            count=len(index),
            width=1,
            producers=rows(self.network, f"{block}.fc1", index),
            consumer=Consumer(f"{block}.fc2", -1, index),
        )


@checked
def toy_encoder(
    *,
    classes: Count,
    image_size: Count | None = None,
    channels: Count = 1,
    patch_size: Count = 2,
    tokens: Count | None = None,
    token_width: Count | None = None,
    width: Count = 48,
    depth: Count = 4,
    heads: Count = 4,
    neurons: Count = 192,
    dropout: Ratio = 0.0,
    checkpoint: ExistingPath | None = None,
    training: Training | None = None,
) -> ToyEncoder:
    """Build the toy encoder, over image patches or over given token vectors.

    Args:
        classes: Number of classes, C.
        image_size: Side of the square images in pixels; leave out for token vectors.
        channels: Colour channels of the images.
        patch_size: Side of a patch in pixels; must divide `image_size`.
        tokens: Token vectors per sample; only without `image_size`.
        token_width: Length of the given token vectors; only without `image_size`.
        width: Width of the residual stream, D; a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads per block.
        neurons: MLP neurons per block.
        dropout: Dropout rate while training.
        checkpoint: Folder saved by `save=true` (its sizes win over the arguments), or a
            `.safetensors` file that fits them. Left out, the model is trained on first use.
        training: How to train it on first use.

    Raises:
        InputError: If sizes don't fit each other, or the checkpoint doesn't fit them.
    """
    arguments: dict[str, Any] = dict(
        classes=classes, image_size=image_size, channels=channels, patch_size=patch_size,
        tokens=tokens, token_width=token_width, width=width, depth=depth, heads=heads,
        neurons=neurons, dropout=dropout,
    )  # fmt: skip
    recipe = Recipe("models.toy_encoder.toy_encoder", arguments)
    if checkpoint is not None:
        dense = toy_encoder(**stored_recipe(checkpoint, recipe).arguments)
        return load_weights(dense, checkpoint)
    return ToyEncoder(_network(**arguments), recipe, training)


def _network(
    *, classes: int, image_size: int | None, channels: int, patch_size: int, tokens: int | None,
    token_width: int | None, width: int, depth: int, heads: int, neurons: int, dropout: float,
) -> Encoder:  # fmt: skip
    if width % heads:
        raise InputError(f"model.width={width}: must be a multiple of model.heads={heads}")
    if image_size is not None:
        if image_size % patch_size:
            raise InputError(f"model.image_size={image_size}: must be a multiple of model.patch_size={patch_size}")
        embed: nn.Module = Patches(channels, patch_size, width)
        tokens = (image_size // patch_size) ** 2
    elif tokens is not None and token_width is not None:
        embed = nn.Linear(token_width, width)
    else:
        raise InputError(
            f"model.image_size=null, model.tokens={tokens}, model.token_width={token_width}: "
            "give image_size for images, or both tokens and token_width for token vectors"
        )
    blocks = [Block(width, heads, neurons, dropout) for _ in range(depth)]
    return Encoder(embed, tokens, width, blocks, classes)
