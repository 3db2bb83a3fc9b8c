"""Mask2Former's decoder of queries (Cheng et al., CVPR 2022, arXiv:2112.01527) with the batch in front.

Transformers runs it with the queries in front, and its cross-attention projects in one function call, where
neither hooks nor cuts reach. Here are the same weights and the same arithmetic, the batch in front, every
projection a linear that is called, and any number of heads down to none.

Shapes: B images, Q queries, S places of a feature map, D width, H heads of d features.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerMaskedAttentionDecoderOutput,
)

from models.recast import recast

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Attention of queries to places; the scale is that of a head, whatever number of heads is left.

    Attributes:
        num_heads: H.
        head_dim: d.
        dropout: Share of the attention dropped in training.
    """

    def __init__(self, projections: dict[str, nn.Module], num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, D).
            keys: (B, S, D).
            values: (B, S, D).
            hidden: True where a query must not look, (B, Q, S); the same for every head.

        Returns:
            (B, Q, D).
        """
        parts = zip(PROJECTIONS, (queries, keys, values), strict=True)
        q, k, v = (self._split(self.get_submodule(name)(given)) for name, given in parts)  # (B, H, S, d)
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)  # (B, H, Q, S)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None], -math.inf)
        shares = dropout(scores.softmax(dim=-1), self.dropout, self.training)
        mixed = (shares @ v).transpose(1, 2)  # (B, Q, H, d)
        return self.get_submodule("out_proj")(mixed.flatten(2))

    def _split(self, given: Tensor) -> Tensor:
        return given.view(*given.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class DecoderLayer(Mask2FormerMaskedAttentionDecoderLayer):
    """Masked cross-attention, self-attention and feed-forward network, the batch in front."""

    def forward(  # type: ignore[override]
        self, stream: Tensor, positions: Tensor, memory: Tensor, places: Tensor, hidden: Tensor
    ) -> Tensor:
        """Map the queries' features to the next layer's.

        Args:
            stream: (B, Q, D).
            positions: Of the queries, (B, Q, D).
            memory: One level of the pixel decoder's features, (B, S, D).
            places: Their positions, (B, S, D).
            hidden: Where each query must not look, (B, Q, S).

        Returns:
            (B, Q, D).
        """

        def cross(x: Tensor) -> Tensor:
            return self.cross_attn(x + positions, memory + places, memory, hidden)

        def among(x: Tensor) -> Tensor:
            return self.self_attn(x + positions, x + positions, x)

        def feed_forward(x: Tensor) -> Tensor:
            return self.fc2(dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training))

        stream = self._added(stream, cross, self.cross_attn_layer_norm)
        stream = self._added(stream, among, self.self_attn_layer_norm)
        return self._added(stream, feed_forward, self.final_layer_norm)

    def _added(self, stream: Tensor, change: Any, norm: nn.Module) -> Tensor:
        change_of = dropout(change(norm(stream) if self.pre_norm else stream), self.dropout, self.training)
        return stream + change_of if self.pre_norm else norm(stream + change_of)


class Decoder(Mask2FormerMaskedAttentionDecoder):
    """All layers, with the masks that each leaves for the next."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        multi_stage_positional_embeddings: list[Tensor],
        pixel_embeddings: Tensor,
        encoder_hidden_states: list[Tensor],
        query_position_embeddings: Tensor,
        feature_size_list: list[Any],
        **kwargs: Any,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Answer as transformers' own decoder does: lists over levels (S, B, D), queries (Q, B, D)."""
        stream, positions = inputs_embeds.transpose(0, 1), query_position_embeddings.transpose(0, 1)
        memories = [level.transpose(0, 1) for level in encoder_hidden_states]
        places = [level.transpose(0, 1) for level in multi_stage_positional_embeddings]
        levels = len(memories)
        normed, mask, hidden = self._predicted(stream, pixel_embeddings, feature_size_list[0])
        normeds, masks = [normed], [mask]
        for number, layer in enumerate(self.layers):
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue
            at = number % levels
            stream = layer(stream, positions, memories[at], places[at], hidden)
            size = feature_size_list[(number + 1) % levels]
            normed, mask, hidden = self._predicted(stream, pixel_embeddings, size)
            normeds.append(normed)
            masks.append(mask)
        return Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=stream,  # type: ignore[arg-type]
            intermediate_hidden_states=tuple(normed.transpose(0, 1) for normed in normeds),  # type: ignore[arg-type]
            masks_queries_logits=tuple(masks),  # type: ignore[arg-type]
        )

    def _predicted(self, stream: Tensor, pixels: Tensor, size: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Normed features (B, Q, D), mask logits (B, Q, h, w), and where the next layer must not look, (B, Q, S)."""
        normed = self.layernorm(stream)
        mask, hidden = self.mask_predictor(normed.transpose(0, 1), pixels, size)
        # the predictor repeats one mask for each head of the dense network; those left share it
        hidden = hidden.unflatten(0, (len(stream), -1))[:, 0]  # (B * H, Q, S) -> (B, Q, S)
        # a query that could look nowhere looks everywhere
        return normed, mask, hidden & ~hidden.all(dim=-1, keepdim=True)


def batch_first(decoder: nn.Module) -> Decoder:
    """A decoder of transformers as the one here, with the same weights; the old one must not be used any more."""
    made = recast(decoder, Decoder)
    layers: Any = made.layers
    made.layers = nn.ModuleList([_layer(layer) for layer in layers])
    return made


def _layer(layer: Any) -> DecoderLayer:
    made = recast(layer, DecoderLayer)
    old = layer.self_attn
    parts = {name: getattr(old, name) for name in (*PROJECTIONS, "out_proj")}
    made.self_attn = Attention(parts, old.num_heads, old.head_dim, old.dropout)  # type: ignore[assignment]
    made.cross_attn = taken_apart(layer.cross_attn)  # type: ignore[assignment]
    return made


def taken_apart(fused: nn.MultiheadAttention) -> Attention:
    """The same attention with the fused projection as three linears."""
    weights, biases = fused.in_proj_weight.detach().chunk(3), fused.in_proj_bias.detach().chunk(3)
    parts: dict[str, nn.Module] = {
        name: _linear(weight, bias) for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True)
    }
    out = fused.out_proj
    assert out.bias is not None
    parts["out_proj"] = _linear(out.weight.detach(), out.bias.detach())
    return Attention(parts, fused.num_heads, fused.head_dim, fused.dropout)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return made
