"""The encoder that this project began with (ECE1512, 2024), mistakes included, to reproduce its published figures.

Written anew from its description. What is wrong with it, and what to use in its place, is in the README: its layers
attend over the samples of a batch and not over tokens, padding is neither masked nor left out of the mean, and
tokens are dropped in a loop over samples that waits for the device each time. `model=toy_encoder` is the right one.

Shapes: B samples, T tokens, D width, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.base import Batch, PrunableModel, Recipe, UnitGroup
from models.batch_cost import EncoderShape
from models.checkpoint import load_weights, stored_recipe
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Ratio, checked
from utils.training import Training


def dropped_as_published(x: Tensor, alive: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Drop tokens whose norm is not above a threshold, sample by sample, and pad to the longest with zeros.

    Args:
        x: Tokens, (B, T, D).
        alive: Which of them are no padding, (B, T), bool.
        threshold: Tokens stay whose L2 norm is above it.

    Returns:
        (B, T', D) and which of them are no padding, (B, T'); T' is what the longest sample keeps.
    """
    keep = (x.norm(dim=-1) > threshold) & alive
    parts = [row[mask.nonzero().flatten()] for row, mask in zip(x, keep, strict=True)]
    longest = max(len(part) for part in parts)
    padded = torch.stack([torch.cat([part, part.new_zeros(longest - len(part), x.shape[2])]) for part in parts])
    there = torch.stack([torch.arange(longest, device=x.device) < len(part) for part in parts])
    return padded, there


class AncestorNetwork(nn.Module):
    """Post-norm layers fed with the axes the wrong way round, a head on every token, a mean over all of them.

    Attributes:
        threshold: Tokens are dropped below it before every layer; None drops none.
        kept: Tokens that each sample kept in each layer of the last pass, (B,) a layer.
    """

    def __init__(self, classes: int, width: int, depth: int, heads: int, neurons: int, dropout: float) -> None:
        super().__init__()
        # no batch_first: (B, T, D) is read as T' = B tokens of B' = T samples
        layers = [nn.TransformerEncoderLayer(width, heads, neurons, dropout) for _ in range(depth)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, classes)
        self.threshold: float | None = None
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to logits (B, C)."""
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        self.kept = []
        for layer in self.layers:
            if self.threshold is not None:
                x, alive = dropped_as_published(x, alive, self.threshold)
            self.kept.append(alive.sum(dim=1))
            x = layer(x)
        return self.head(x).mean(dim=1)


class AncestorEncoder(PrunableModel):
    """The published toy; it has no units, only a threshold for tokens."""

    network: AncestorNetwork

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """None: nothing but tokens is dropped."""
        return ()

    def blocks(self) -> tuple[str, ...]:
        """Layers from input to output."""
        return tuple(f"layers.{i}" for i in range(len(self.network.layers)))

    def feature_points(self) -> tuple[str, ...]:
        """Output of each layer."""
        return self.blocks()

    def logits(self, batch: Batch) -> Tensor:
        """Class logits, (B, C)."""
        return self.network(batch["inputs"])

    def drop_below(self, threshold: float) -> None:
        """Drop tokens as published from now on, in place."""
        self.network.threshold = threshold

    def kept_counts(self, batch: Batch) -> list[list[int]]:
        """Tokens that each sample of a batch keeps, layer by layer."""
        with torch.inference_mode():
            self.logits(self.place(batch))
        return [counts.tolist() for counts in self.network.kept]

    @property
    def shape(self) -> EncoderShape:
        """Its sizes, for closed forms."""
        sizes = self.recipe.arguments
        return EncoderShape(sizes["width"], sizes["neurons"], sizes["depth"], sizes["classes"])

    def fingerprint(self) -> str:
        """The weights' hash with the threshold."""
        return f"{super().fingerprint()}-{self.network.threshold}"


@checked
def ancestor_encoder(
    *,
    classes: Count,
    token_width: Count,
    width: Count = 512,
    depth: Count = 2,
    heads: Count = 8,
    neurons: Count = 2048,
    dropout: Ratio = 0.1,
    checkpoint: ExistingPath | None = None,
    training: Training | None = None,
) -> AncestorEncoder:
    """Build the published encoder; for its figures only.

    Args:
        classes: Number of classes, C.
        token_width: Length of the given token vectors; must be `width`, there is no embedding.
        width: Width of the residual stream, D; a multiple of `heads`.
        depth: Number of layers.
        heads: Attention heads a layer.
        neurons: MLP neurons a layer.
        dropout: Dropout rate while training.
        checkpoint: A `.safetensors` file or a folder that fits the sizes.
        training: How to train it on first use.

    Raises:
        InputError: If sizes don't fit each other.
    """
    if width % heads:
        raise InputError(f"model.width={width}: must be a multiple of model.heads={heads}")
    if token_width != width:
        raise InputError(f"model.width={width}: must be data.token_width={token_width}, there is no embedding")
    arguments: dict[str, Any] = dict(
        classes=classes, token_width=token_width, width=width, depth=depth, heads=heads, neurons=neurons,
        dropout=dropout,
    )  # fmt: skip
    recipe = Recipe("models.ancestor_encoder.ancestor_encoder", arguments)
    if checkpoint is not None:
        dense = ancestor_encoder(**stored_recipe(checkpoint, recipe).arguments)
        return load_weights(dense, checkpoint)
    network = AncestorNetwork(classes, width, depth, heads, neurons, dropout)
    return AncestorEncoder(network, recipe, training)
