"""Attentions of timm that run with any number of heads: the same weights and names under another forward.

timm's own reshape to the width of their input, or by -1, which a cut attention doesn't have or can't have; some hand
a weight to a function instead of calling the linear that owns it. Widths follow `num_heads` and `head_dim` here.

Shapes: B samples or windows, T tokens, D width of the stream, H heads, d features of a head.
"""

import math
from typing import Any

import timm.models.beit
import timm.models.eva
import timm.models.metaformer
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import timm.models.xcit
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

# limits of SwinV2's scores (Liu et al., arXiv:2111.09883, section 3.2): the factor, and the height of the bias
HIGHEST_SCALE, BIAS_HEIGHT = math.log(100.0), 16.0


def without_heads(attention: Any, x: Tensor) -> Tensor:
    """What an attention adds once its last head has gone: the bias of its projection, (B, T, D)."""
    return attention.proj_drop(attention.proj(x.new_zeros(*x.shape[:-1], 0)))


def heads_of(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of one projection, (B, H, T, d) each; a bias that lies in parts is added."""
    qkv = attention.qkv(x)
    # only some of timm's attentions have their bias in parts
    parts = [getattr(attention, name, None) for name in ("q_bias", "k_bias", "v_bias")]
    if parts[0] is not None:
        qkv = qkv + torch.cat(parts)  # type: ignore[arg-type]
    shape = (3, attention.num_heads, attention.head_dim)
    return qkv.unflatten(-1, shape).permute(2, 0, 3, 1, 4).unbind(0)  # (B, T, 3 H d) -> (3, B, H, T, d)


def joined(attention: Any, mixed: Tensor) -> Tensor:
    """Project heads (B, H, T, d) to the stream, (B, T, D)."""
    return attention.proj_drop(attention.proj(mixed.transpose(1, 2).flatten(2)))


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Look up the bias of every pair of tokens: a table (R, H) and an index (T, T) give (1, H, T, T)."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).unsqueeze(0)


def dropout_of(attention: Any) -> float:
    """The share of attention weights that training leaves out."""
    return attention.attn_drop.p if attention.training else 0.0


class WindowHeads(timm.models.swin_transformer.WindowAttention):
    """Swin's attention inside windows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B * windows, T, D), with a mask (windows, T, T) where they are shifted."""
        return super().forward(x, mask) if self.num_heads else without_heads(self, x)


class CosineWindowHeads(timm.models.swin_transformer_v2.WindowAttention):
    """SwinV2's attention inside windows: scores are cosines, the bias comes from a small network."""

    head_dim: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B * windows, T, D), with a mask (windows, T, T) where they are shifted."""
        q, k, v = heads_of(self, x)
        scale = self.logit_scale.clamp(max=HIGHEST_SCALE).exp()  # (H, 1, 1)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)  # (1, 2h-1, 2w-1, H) -> (R, H)
        bias = BIAS_HEIGHT * position_bias(table, self.relative_position_index).sigmoid()  # type: ignore[arg-type]
        scores = normalize(q, dim=-1) @ normalize(k, dim=-1).mT * scale + bias  # (B * windows, H, T, T)
        if mask is not None:
            scores = (scores.unflatten(0, (len(scores) // len(mask), len(mask))) + mask[:, None]).flatten(0, 1)
        return joined(self, self.attn_drop(self.softmax(scores)) @ v)


class BeitHeads(timm.models.beit.Attention):
    """BEiT's attention, with a relative position bias that knows the class token."""

    head_dim: int

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map tokens (B, T, D)."""
        q, k, v = heads_of(self, x)
        table = self.relative_position_bias_table
        bias = None if table is None else position_bias(table, self.relative_position_index)  # type: ignore[arg-type]
        return joined(self, scaled_dot_product_attention(q, k, v, bias, dropout_of(self)))


class EvaHeads(timm.models.eva.EvaAttention):
    """EVA's attention, with rotary positions that all heads share; projections in one or in three."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map tokens (B, T, D)."""
        q, k, v = heads_of(self, x) if self.qkv is not None else self._split(x)
        q, k = (self._turned(norm(t), rope, v) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask, dropout_of(self), is_causal)
        if self.gate is not None:
            mixed = mixed * self._by_head(self.gate(x).sigmoid())
        return joined(self, mixed)

    def _split(self, x: Tensor) -> list[Tensor]:
        return [self._by_head(made(x)) for made in (self.q_proj, self.k_proj, self.v_proj)]  # type: ignore[misc]

    def _by_head(self, made: Tensor) -> Tensor:
        return made.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, T, H d) -> (B, H, T, d)

    def _turned(self, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
        """Rotate all tokens but those in front by their positions."""
        if rope is None:
            return x
        front, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([front, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], dim=2).type_as(like)


class CovarianceHeads(timm.models.xcit.XCA):
    """XCiT's attention between the features of a head instead of between tokens."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D)."""
        q, k, v = (t.mT for t in heads_of(self, x))  # (B, H, d, T)
        scores = normalize(q, dim=-1) @ normalize(k, dim=-1).mT * self.temperature  # (B, H, d, d)
        mixed = self.attn_drop(scores.softmax(dim=-1)) @ v  # (B, H, d, T)
        return joined(self, mixed.mT)


class PlainHeads(timm.models.metaformer.Attention):
    """CAFormer's attention."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D)."""
        q, k, v = heads_of(self, x)
        return joined(self, scaled_dot_product_attention(q, k, v, None, dropout_of(self)))


def child(module: nn.Module, name: str) -> nn.Module | None:
    """A module's own child of a name, or None where it has none."""
    return dict(module.named_children()).get(name)
