"""BERT and its kin on packed tokens: padding is dropped behind the embedding and put back before the head.

The same network with the same names: its encoder takes the tokens of all samples in one row, (1, N, D), and its
attentions answer by `ragged_attention`, each sample for itself. A network that is being watched (gates, scores,
statistics, replayed blocks) runs padded, since hooks read (B, T, D); the two agree to rounding.

Shapes: B samples, T tokens with padding, N tokens without, D width, H heads, dh head width.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.ragged import Packing, pack, packing_of, ragged_attention, unpack
from models.recast import recast
from utils.errors import InputError
from utils.hooks import is_hooked, is_replayed

ATTENTION = "pare_packed"


class PackingModel(nn.Module):
    """The part of a base model that says where the tokens are; comes before transformers' class."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        packing: Packing | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        """Map (B, T) to what the base model gives; `packing` spares finding the tokens in the mask."""
        stock: Any = super().forward
        if attention_mask is None or attention_mask.ndim != 2 or _needs_padding(self, others):
            return stock(input_ids, attention_mask=attention_mask, **others)
        return stock(input_ids, packing=packing or packing_of(attention_mask), **others)


class PackingEncoder(nn.Module):
    """The part of an encoder that packs what goes in and unpacks what comes out."""

    def forward(self, hidden_states: Tensor, *args: Any, packing: Packing | None = None, **others: Any) -> Any:
        """Map (B, T, D) to an output whose `last_hidden_state` is (B, T, D), zeros at the padding."""
        stock: Any = super().forward
        if packing is None:
            return stock(hidden_states, *args, **others)
        found = stock(pack(hidden_states, packing)[None], *args, packing=packing, **others)  # (1, N, D)
        found.last_hidden_state = unpack(found.last_hidden_state[0], packing)
        return found


def _needs_padding(network: nn.Module, asked: dict[str, Any]) -> bool:
    inner = asked.get("output_hidden_states") or asked.get("output_attentions")
    return bool(inner) or is_hooked(network) or is_replayed(network)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | None = None, scaling: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention on (1, H, N, dh) within samples: (1, N, H, dh); its own one without a packing."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (1, H, N, dh) -> (N, H, dh)
    return ragged_attention(q, k, v, packing, scale=scaling, dropout=dropout)[None], None


def run_packed(base: nn.Module, encoder: str, attentions: list[nn.Module]) -> nn.Module:
    """The same base model, run on packed tokens; the one given must not be used any more.

    Args:
        base: The network without its head, such as `BertModel`.
        encoder: Name in it of the module that holds the layers.
        attentions: The modules that compute attention.

    Raises:
        InputError: If they compute it by themselves and not by transformers' interface.
    """
    if own := [type(attention).__name__ for attention in attentions if "config" not in vars(attention)]:
        raise InputError(
            f"model.packed=true: {own[0]} computes attention by itself, so that it cannot run on packed tokens; "
            "leave model.packed=false"
        )
    AttentionInterface.register(ATTENTION, packed_attention)
    for attention in attentions:
        # a configuration of its own, so that masks are made, and the model is saved, as ever
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = ATTENTION  # type: ignore[union-attr]
    setattr(base, encoder, _joined(PackingEncoder, base.get_submodule(encoder)))
    return _joined(PackingModel, base)


def _joined(part: type[nn.Module], module: nn.Module) -> nn.Module:
    """The module with a part's forward around its own."""
    kind = type(module)
    return recast(module, type(f"{part.__name__}{kind.__name__}", (part, kind), {}))
