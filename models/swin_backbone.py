"""The Swin backbone of transformers: feature maps of every stage, and where the units of its blocks lie.

Shapes: B images, H x W patches of a stage, D its width.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.models.swin.modeling_swin import SwinAttention, SwinBackbone

from models.base import Attribute, Consumer, Emptied, Slices, UnitGroup, rows, unit_index
from models.recast import recast


class FeatureMaps(SwinBackbone):
    """Computes the maps and nothing else.

    Transformers' own forward records hidden states by hooks that stay on the modules, and norms the last stage for
    an output that nobody reads.
    """

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:  # type: ignore[override]
        """Map images (B, 3, 4 H, 4 W) to one map (B, D, H, W) a stage that the configuration names."""
        stream, size = self.swin.embeddings(pixel_values)
        maps = self._wanted("stem", stream.unflatten(1, size).permute(0, 3, 1, 2))
        stages: Any = self.swin.encoder.layers
        for name, stage in zip(self.stage_names[1:], stages, strict=True):
            stream, given, _ = stage(
                stream, size, always_partition=True, output_hidden_states_before_downsampling=True
            )  # (B, H * W, D) of the next stage, and (B, D, H, W) of this one
            maps += self._wanted(name, given)
            size = tuple((length + 1) // 2 for length in size)
        return BackboneOutput(feature_maps=tuple(maps))  # type: ignore[arg-type]

    def _wanted(self, name: str, given: Tensor) -> list[Tensor]:
        if name not in self.out_features:
            return []
        normed = self.hidden_states_norms[name](given.permute(0, 2, 3, 1))  # (B, H, W, D)
        return [normed.permute(0, 3, 1, 2).contiguous()]


class NoHeads(SwinAttention):
    """A window attention without heads, whose own reshape cannot run on nothing: its output's bias."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Map windows (B * windows, patches, D) to the same shape."""
        return self.o_proj(hidden_states.new_zeros(*hidden_states.shape[:-1], 0)), None


def without_heads(attention: nn.Module) -> nn.Module:
    """The same weights under a forward that runs on no heads."""
    return recast(attention, NoHeads)


def block_names(backbone: nn.Module, prefix: str) -> tuple[str, ...]:
    """Names of all blocks, stage by stage."""
    stages: Any = backbone.get_submodule("swin.encoder.layers")
    return tuple(
        f"{prefix}.swin.encoder.layers.{s}.blocks.{b}"
        for s, stage in enumerate(stages)
        for b in range(len(stage.blocks))
    )


def block_groups(network: nn.Module, layer: int, block: str) -> tuple[UnitGroup, UnitGroup]:
    """Heads and neurons of one block."""
    return _heads(network, layer, block), mlp_neurons(network, layer, block, f"{block}.mlp.fc1", f"{block}.mlp.fc2")


def mlp_neurons(network: nn.Module, layer: int, block: str, hidden: str, reader: str) -> UnitGroup:
    """The neurons between two linears."""
    made: Any = network.get_submodule(hidden)
    index = unit_index(made.out_features, 1)
    return UnitGroup(
        name=f"{block}.neurons",
        kind="neuron",
        layer=layer,
        count=len(index),
        width=1,
        producers=rows(network, hidden, index),
        consumer=Consumer(reader, -1, index),
    )


def _heads(network: nn.Module, layer: int, block: str) -> UnitGroup:
    name = f"{block}.attention"
    attention: Any = network.get_submodule(name)
    count, width = attention.num_attention_heads, attention.head_dim
    index, bias = unit_index(count, width), attention.relative_position_bias
    made = tuple(p for part in ("q_proj", "k_proj", "v_proj") for p in rows(network, f"{name}.{part}", index))
    table = Slices(f"{name}.relative_position_bias.relative_position_bias_table", 1, unit_index(count, 1))
    return UnitGroup(
        name=f"{block}.heads",
        kind="head",
        layer=layer,
        count=count,
        width=width,
        producers=(*made, table),
        consumer=Consumer(f"{name}.o_proj", -1, index),
        after_cut=(Attribute(name, "num_attention_heads"),),
        emptied=Emptied(name, without_heads),
        pairwise_features=2 * width,
        keys_per_query=int(bias.window_area),
    )
