"""BERT-like layers that drop tokens on their way: the same weights under other forwards.

Shapes: B samples, T tokens, D width, H heads, dh head width.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.keeping_flow import KeepingFlow
from models.recast import recast


class KeepingAttention(nn.Module):
    """Self-attention of a BERT-like layer among tokens of which some are gone; the flow mixes them.

    Stands in front of the family's own class, which mixes as long as nothing has gone and nothing is looked at.

    Attributes:
        flow: What the layers share.
        projections: Names of query, key and value.
        width: Features of a head.
        output: Name of the linear that reads the heads where it is inside; None elsewhere.
    """

    flow: KeepingFlow
    projections: tuple[str, str, str]
    width: int
    output: str | None
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        """Map (B, T, D) to (B, T, H*dh), or to (B, T, D) where the output linear is inside."""
        if self.flow.idle:
            return super().forward(hidden_states, attention_mask=attention_mask, **others)  # type: ignore[misc]
        shape = hidden_states.shape[:-1]
        q, k, v = (
            self._projected(name, hidden_states).transpose(1, 2)  # (B, T, H, dh) -> (B, H, T, dh)
            for name in self.projections
        )
        scale, dropout = self.width**-0.5, self.dropout.p if self.training else 0.0

        def dense(mask: Tensor | None) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)

        mixed = self.flow.attend(q, k, v, scale, dense, attention_mask)
        mixed = mixed.transpose(1, 2).reshape(*shape, -1) if q.shape[1] else hidden_states.new_zeros(*shape, 0)
        return mixed if self.output is None else self.get_submodule(self.output)(mixed), None

    def _projected(self, name: str, x: Tensor) -> Tensor:
        linear = self.get_submodule(name)
        heads = int(linear.out_features) // self.width  # type: ignore[arg-type]
        return linear(x).view(*x.shape[:-1], heads, self.width)  # (B, T, H*dh) -> (B, T, H, dh)


class KeepingLayer(nn.Module):
    """A layer whose own forward runs `feed_forward_chunk` behind the attention, with fewer tokens from either on.

    Stands in front of the family's own class.

    Attributes:
        flow: What the layers share.
        layer: Its position.
    """

    flow: KeepingFlow
    layer: int

    def forward(self, hidden_states: Tensor, *args: Any, **others: Any) -> Any:
        """Map (B, T, D) to (B, T', D), inside a tuple where the family has it so."""
        out: Any = super().forward(self.flow.enter(hidden_states, self.layer), *args, **others)  # type: ignore[misc]
        return self.flow.leave(out) if isinstance(out, Tensor) else (self.flow.leave(out[0]), *out[1:])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """The second half: (B, T, D) to (B, T', D)."""
        return super().feed_forward_chunk(self.flow.leave_attention(attention_output))  # type: ignore[misc]


class KeepingDistilLayer(nn.Module):
    """DistilBERT's layer, with fewer tokens from one of its halves on."""

    flow: KeepingFlow
    layer: int
    attention: nn.Module
    sa_layer_norm: nn.Module
    ffn: nn.Module
    output_layer_norm: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **others: Any) -> Tensor:
        """Map (B, T, D) to (B, T', D)."""
        x = self.flow.enter(hidden_states, self.layer)
        x = self.sa_layer_norm(self.attention(x, attention_mask=attention_mask, **others)[0] + x)
        x = self.flow.leave_attention(x)
        return self.flow.leave(self.output_layer_norm(self.ffn(x) + x))


def drop_in_layer(
    layer: nn.Module, position: int, flow: KeepingFlow, attention: str, projections: tuple[str, str, str],
    output: str | None,
) -> nn.Module:  # fmt: skip
    """The same layer as one that drops tokens; the one given must not be used any more.

    Args:
        layer: A layer of the encoder.
        position: Where it stands, from 0.
        flow: What the layers share.
        attention: The module that keeps the heads, relative to the layer.
        projections: Query, key and value, relative to that module.
        output: The linear that reads the heads where it is inside that module.
    """
    before: Any = layer.get_submodule(attention)
    own = dict(projections=projections, width=int(before.attention_head_size), output=output)
    parent, _, leaf = attention.rpartition(".")
    kind = KeepingLayer if output is None else KeepingDistilLayer
    made = recast(layer, _as(kind, layer), flow=flow, layer=position, chunk_size_feed_forward=0)
    mixing = recast(before, _as(KeepingAttention, before), flow=flow, **own)
    setattr(made.get_submodule(parent), leaf, mixing)
    return made


def _as(kind: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """The class of a module with the forward of another in front of its own."""
    return type(module) if isinstance(module, kind) else _joined(kind, type(module))


@cache
def _joined(kind: type[nn.Module], family: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}Of{family.__name__}", (kind, family), {})
