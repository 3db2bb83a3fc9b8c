"""Where timm's layers keep what belongs to a head or to a neuron: one row a class of layer.

Families share these layers, so that a family has only to say where in a block they lie (`models/timm_family.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.models.beit
import timm.models.eva
import timm.models.metaformer
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import timm.models.xcit
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import ConvMlp, GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from torch import nn

import models.timm_attention as cuttable
from models.base import Attribute, Consumer, Slices, UnitGroup, rows, unit_index
from models.recast import recast


def every_token(attention: Any) -> None:
    """Each token attends to all of them."""


def tokens_of_window(attention: Any) -> int:
    """Each token attends to those of its window."""
    return math.prod(attention.window_size)


def features_of_head(attention: Any) -> int:
    """Attention runs between the features of a head."""
    return attention.head_dim


@dataclass(frozen=True)
class AttentionLayout:
    """Where a class of attention keeps its heads; tensors and linears that a variant leaves out are skipped.

    Attributes:
        kind: The class.
        runs_as: A subclass that runs with any number of heads; None where the class does.
        fused: Linears with queries, keys and values one after the other.
        plain: Linears with one row for each feature of a head.
        vectors: Tensors with one entry for each feature of queries, of keys, or of values.
        per_head: Tensors with one entry a head, and the dimension it lies on.
        counts: Attributes that follow the number of heads, and whether they count features.
        reader: The linear that reads the heads.
        keys: How many others a token is compared with; None for all tokens.
    """

    kind: type[nn.Module]
    runs_as: type[nn.Module] | None = None
    fused: tuple[str, ...] = ("qkv",)
    plain: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()
    counts: tuple[tuple[str, bool], ...] = (("num_heads", False),)
    reader: str = "proj"
    keys: Callable[[Any], int | None] = every_token


@dataclass(frozen=True)
class MlpLayout:
    """Where a class of MLP keeps its neurons.

    Attributes:
        kind: The class.
        producers: Linears or convolutions, each with how many rows it has for a neuron, one range after the other.
        reader: The linear or convolution that reads the neurons.
        between: Children that must do nothing, as they would mix neurons.
    """

    kind: type[nn.Module]
    producers: tuple[tuple[str, int], ...] = (("fc1", 1),)
    reader: str = "fc2"
    between: tuple[str, ...] = ("norm",)


Layout = AttentionLayout | MlpLayout

BIASES = ("q_bias", "k_bias", "v_bias")
SPLIT = ("q_proj", "k_proj", "v_proj", "gate")

LAYOUTS: tuple[Layout, ...] = (
    AttentionLayout(Attention, plain=("gate",), counts=(("num_heads", False), ("attn_dim", True))),
    AttentionLayout(
        AttentionRope, plain=SPLIT,
        counts=(("num_heads", False), ("num_kv_heads", False), ("attn_dim", True), ("kv_dim", True)),
    ),
    AttentionLayout(
        timm.models.swin_transformer.WindowAttention, cuttable.WindowHeads,
        per_head=(("relative_position_bias_table", 1),), keys=tokens_of_window,
    ),
    AttentionLayout(
        timm.models.swin_transformer_v2.WindowAttention, cuttable.CosineWindowHeads, vectors=BIASES,
        per_head=(("logit_scale", 0), ("cpb_mlp.2.weight", 0)), keys=tokens_of_window,
    ),
    AttentionLayout(
        timm.models.beit.Attention, cuttable.BeitHeads, vectors=BIASES,
        per_head=(("relative_position_bias_table", 1),),
    ),
    AttentionLayout(timm.models.eva.EvaAttention, cuttable.EvaHeads, plain=SPLIT, vectors=BIASES),
    AttentionLayout(
        timm.models.xcit.XCA, cuttable.CovarianceHeads, per_head=(("temperature", 0),), keys=features_of_head
    ),
    AttentionLayout(
        timm.models.metaformer.Attention, cuttable.PlainHeads, counts=(("num_heads", False), ("attention_dim", True))
    ),
    MlpLayout(Mlp),
    MlpLayout(GluMlp, (("fc1", 2),)),
    MlpLayout(SwiGLU, (("fc1_g", 1), ("fc1_x", 1))),
    MlpLayout(ConvMlp),
)  # fmt: skip

INEXACT = {
    GlobalResponseNormMlp: "its GRN divides the strength of each neuron by the mean over all of them",
    GatedMlp: "its spatial gate multiplies one half of the neurons by a normalised other half",
}


def layout_of(module: nn.Module, layouts: tuple[Layout, ...]) -> Layout | None:
    """The row for a module's class, or None."""
    return next((row for row in layouts if type(module) in (row.kind, _runs_as(row))), None)


def _runs_as(layout: Layout) -> type[nn.Module] | None:
    return layout.runs_as if isinstance(layout, AttentionLayout) else None


def why_uncovered(module: nn.Module, layout: Layout | None) -> str | None:
    """Why units of a module can't be cut exactly, in one line; None if they can."""
    kind = type(module).__name__
    if layout is None:
        return f"{kind}: {INEXACT.get(type(module), 'is in no row of models/timm_layout.py')}"
    names = layout.between if isinstance(layout, MlpLayout) else ("norm",)
    units = "neurons" if isinstance(layout, MlpLayout) else "heads"
    for name in names:
        if not isinstance(cuttable.child(module, name) or nn.Identity(), nn.Identity):
            return f"{kind}: its {name} normalises over all {units} before they are read"
    if getattr(module, "num_kv_heads", None) not in (None, getattr(module, "num_heads", None)):
        return f"{kind}: several query heads share the keys of one (num_kv_heads)"
    return None


def runnable(attention: nn.Module, layout: AttentionLayout) -> nn.Module:
    """The attention itself, or the same contents in the class that runs with any number of heads."""
    if layout.runs_as is None:
        return attention
    width = attention.get_submodule(layout.reader).in_features // attention.num_heads  # type: ignore[operator]
    return recast(attention, layout.runs_as, head_dim=width)


def head_group(network: nn.Module, block: str, layer: int, name: str, layout: AttentionLayout) -> UnitGroup:
    """The heads of one attention.

    Args:
        network: Owner of the attention.
        block: Name of its block.
        layer: Position of the block.
        name: Name of the attention.
        layout: The row of its class.
    """
    attention: Any = network.get_submodule(name)
    count, width = int(attention.num_heads), int(attention.head_dim)
    span, index, single = count * width, unit_index(count, width), unit_index(count, 1)
    owned = dict(attention.named_modules())
    fused = [part for part in layout.fused if part in owned]
    plain = [part for part in layout.plain if part in owned]
    three = unit_index(count, width, 0, span, 2 * span)
    held = {n for n, t in [*attention.named_parameters(), *attention.named_buffers()] if t is not None}
    return UnitGroup(
        name=f"{block}.heads",
        kind="head",
        layer=layer,
        count=count,
        width=width,
        producers=(
            *(p for part in fused for p in rows(network, f"{name}.{part}", three)),
            *(p for part in plain for p in rows(network, f"{name}.{part}", index)),
            *(Slices(f"{name}.{part}", 0, index) for part in layout.vectors if part in held),
            *(Slices(f"{name}.{part}", dim, single) for part, dim in layout.per_head if part in held),
        ),
        consumer=Consumer(f"{name}.{layout.reader}", -1, index),
        after_cut=tuple(Attribute(name, part, width if wide else 1) for part, wide in layout.counts),
        pairwise_features=2 * width,
        keys_per_query=layout.keys(attention),
    )


def neuron_group(
    network: nn.Module, block: str, layer: int, name: str, layout: MlpLayout, kind: str = "neurons"
) -> UnitGroup:
    """The neurons of one MLP, of linears or of convolutions of one position.

    Args:
        network: Owner of the MLP.
        block: Name of its block.
        layer: Position of the block.
        name: Name of the MLP.
        layout: The row of its class.
        kind: Last part of the group's name.
    """
    weight: Any = network.get_parameter(f"{name}.{layout.reader}.weight")
    count = weight.shape[1]
    index = unit_index(count, 1)

    def ranges(times: int) -> Any:
        return unit_index(count, 1, *(count * part for part in range(times)))

    return UnitGroup(
        name=f"{block}.{kind}",
        kind="neuron",
        layer=layer,
        count=count,
        width=1,
        producers=tuple(p for part, n in layout.producers for p in rows(network, f"{name}.{part}", ranges(n))),
        consumer=Consumer(f"{name}.{layout.reader}", 1 if weight.ndim == 4 else -1, index),
    )
