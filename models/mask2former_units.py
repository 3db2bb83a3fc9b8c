"""Where the units of a Mask2Former lie: its backbone, the layers of its pixel decoder, and those of its decoder.

Deformable attention samples few places for each query, with offsets and weights of every head's own, so that a head
leaves the others as they are and can be cut exactly.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as DeformableAttention,
)

from models.base import Attribute, Consumer, Emptied, Products, UnitGroup, rows, unit_index
from models.mask2former_decoder import PROJECTIONS
from models.recast import recast
from models.swin_backbone import block_groups, block_names, mlp_neurons

BACKBONE = "model.pixel_level_module.encoder"
PIXEL_LAYERS = "model.pixel_level_module.decoder.encoder.layers"
DECODER = "model.transformer_module.decoder"
MASK_FEATURES = "model.pixel_level_module.decoder.mask_projection"
PREDICTOR = f"{DECODER}.mask_predictor.mask_embedder"


class NoHeads(DeformableAttention):
    """A deformable attention without heads, whose own reshape cannot run on nothing: its output's bias."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Map (B, S, D) to the same shape."""
        return self.output_proj(hidden_states.new_zeros(*hidden_states.shape[:-1], 0)), None


def without_heads(attention: nn.Module) -> nn.Module:
    """The same weights under a forward that runs on no heads."""
    return recast(attention, NoHeads)


def note_head_widths(network: nn.Module) -> None:
    """Write down how wide a sampling head is, which no longer shows once all are gone."""
    for name in pixel_layers(network):
        attention: Any = network.get_submodule(f"{name}.self_attn")
        attention.head_dim = attention.d_model // attention.n_heads


def backbone_blocks(network: nn.Module) -> tuple[str, ...]:
    """Names of the backbone's blocks, stage by stage."""
    return block_names(network.get_submodule(BACKBONE), BACKBONE)


def pixel_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the pixel decoder's layers."""
    return _listed(network, PIXEL_LAYERS)


def decoder_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the decoder's layers."""
    return _listed(network, f"{DECODER}.layers")


def all_groups(network: nn.Module) -> tuple[UnitGroup, ...]:
    """Unit groups of all layers, in execution order."""
    backbone, pixels, queries = backbone_blocks(network), pixel_layers(network), decoder_layers(network)
    made = [block_groups(network, i, block) for i, block in enumerate(backbone)]
    made += [_pixel_groups(network, i, layer) for i, layer in enumerate(pixels, len(backbone))]
    made += [_decoder_groups(network, i, layer) for i, layer in enumerate(queries, len(backbone) + len(pixels))]
    return tuple(group for groups in made for group in groups)


def mask_products(network: nn.Module) -> Products:
    """Every query's product with every pixel, once a prediction of masks."""
    features: Any = network.get_submodule(MASK_FEATURES)
    last = f"{PREDICTOR}.{len(list(network.get_submodule(PREDICTOR).children())) - 1}.0"
    return Products(last, MASK_FEATURES, features.out_channels)


def _listed(network: nn.Module, name: str) -> tuple[str, ...]:
    layers: Any = network.get_submodule(name)
    return tuple(f"{name}.{i}" for i in range(len(layers)))


def _pixel_groups(network: nn.Module, layer: int, name: str) -> tuple[UnitGroup, ...]:
    return _sampling_heads(network, layer, name), mlp_neurons(network, layer, name, f"{name}.fc1", f"{name}.fc2")


def _decoder_groups(network: nn.Module, layer: int, name: str) -> tuple[UnitGroup, ...]:
    neurons = mlp_neurons(network, layer, name, f"{name}.fc1", f"{name}.fc2")
    return _heads(network, layer, name, "cross"), _heads(network, layer, name, "self"), neurons


def _sampling_heads(network: nn.Module, layer: int, name: str) -> UnitGroup:
    module = f"{name}.self_attn"
    attention: Any = network.get_submodule(module)
    count, places, width = attention.n_heads, attention.n_levels * attention.n_points, attention.head_dim
    parts = (("sampling_offsets", 2 * places), ("attention_weights", places), ("value_proj", width))
    return UnitGroup(
        name=f"{name}.heads",
        kind="head",
        layer=layer,
        count=count,
        width=width,
        producers=tuple(p for part, size in parts for p in rows(network, f"{module}.{part}", unit_index(count, size))),
        consumer=Consumer(f"{module}.output_proj", -1, unit_index(count, width)),
        after_cut=(Attribute(module, "n_heads"), Attribute(module, "d_model", per_unit=width)),
        emptied=Emptied(module, without_heads),
    )


def _heads(network: nn.Module, layer: int, name: str, which: str) -> UnitGroup:
    module = f"{name}.{which}_attn"
    attention: Any = network.get_submodule(module)
    index = unit_index(attention.num_heads, attention.head_dim)
    return UnitGroup(
        name=f"{name}.{which}_heads",
        kind="head",
        layer=layer,
        count=len(index),
        width=attention.head_dim,
        producers=tuple(p for part in PROJECTIONS for p in rows(network, f"{module}.{part}", index)),
        consumer=Consumer(f"{module}.out_proj", -1, index),
        after_cut=(Attribute(module, "num_heads"),),
        pairwise_features=2 * attention.head_dim,
        keys_from=f"{module}.k_proj",
    )
