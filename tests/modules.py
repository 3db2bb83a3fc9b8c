"""Small hand-made models whose units lie in awkward places.

A fused qkv with a per-head bias table, grouped-query attention, and residual convolution
blocks with batch norm, one of them a bottleneck whose middle weight two groups slice.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from models.base import Attribute, Batch, Consumer, PrunableModel, Recipe, Slices, UnitGroup, rows, unit_index

WIDTH, TOKENS, CLASSES = 24, 5, 7


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight, bias and statistic a value that would show a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            fresh = torch.randn(tensor.shape, generator=generator) * 0.4
            tensor.copy_(fresh.abs() + 0.5 if name.endswith("running_var") else fresh)
    return network


class FusedAttention(nn.Module):
    """Attention with one qkv projection and a learned bias per query, key and head."""

    def __init__(self, heads: int = 4, head_width: int = 6) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_width
        self.scale = head_width**-0.5
        self.attn_dim = heads * head_width
        self.qkv = nn.Linear(WIDTH, 3 * self.attn_dim)
        self.bias_table = nn.Parameter(torch.zeros(TOKENS * TOKENS, heads))
        self.proj = nn.Linear(self.attn_dim, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)  # (3, B, H, T, dh)
        bias = self.bias_table.T.reshape(1, self.num_heads, TOKENS, TOKENS)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class GroupedQueryAttention(nn.Module):
    """Attention in which several query heads share a key and value head."""

    def __init__(self, kv_heads: int = 3, queries_per_kv: int = 2, head_width: int = 4) -> None:
        super().__init__()
        self.kv_heads, self.queries_per_kv, self.head_width = kv_heads, queries_per_kv, head_width
        self.q_proj = nn.Linear(WIDTH, kv_heads * queries_per_kv * head_width)
        self.k_proj = nn.Linear(WIDTH, kv_heads * head_width, bias=False)
        self.v_proj = nn.Linear(WIDTH, kv_heads * head_width)
        self.o_proj = nn.Linear(kv_heads * queries_per_kv * head_width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.kv_heads * self.queries_per_kv, self.head_width)).transpose(1, 2)
        k, v = (
            p(x).unflatten(-1, (self.kv_heads, self.head_width)).transpose(1, 2) for p in (self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.queries_per_kv, dim=1) for t in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.head_width**-0.5)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class TokenNetwork(nn.Module):
    """Two residual layers of one attention, mean pooling, a classifier."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in layers])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.head(x.mean(dim=1))


class ConvBlock(nn.Module):
    """conv - batch norm - relu - conv, and a bottleneck of three, each around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 10, 3, padding=1, stride=1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 4, 3, padding=1)
        self.narrow = nn.Conv2d(4, 6, 1)
        self.bn2 = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8, affine=False)
        self.wide = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv2(relu(self.bn1(self.conv1(x))))
        x = x + self.wide(relu(self.bn3(self.middle(relu(self.bn2(self.narrow(x)))))))
        return self.head(x.mean(dim=(2, 3)))


class _HandMade(PrunableModel):
    network: nn.Module

    def blocks(self) -> tuple[str, ...]:
        return ()

    def feature_points(self) -> tuple[str, ...]:
        return ()

    def logits(self, batch: Batch) -> Tensor:
        return self.network(batch["inputs"])


class FusedModel(_HandMade):
    """Heads of a fused qkv: three ranges of one tensor, and a column of the bias table."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        return tuple(self._heads(i, layer) for i, layer in enumerate(self.network.layers))  # type: ignore[arg-type]

    def _heads(self, i: int, layer: FusedAttention) -> UnitGroup:
        count, width = layer.num_heads, layer.head_dim
        name, span = f"layers.{i}", layer.num_heads * layer.head_dim
        return UnitGroup(
            name=f"{name}.heads",
            kind="head",
            layer=i,
            count=count,
            width=width,
            producers=(
                *rows(self.network, f"{name}.qkv", unit_index(count, width, 0, span, 2 * span)),
                Slices(f"{name}.bias_table", 1, unit_index(count, 1)),
            ),
            consumer=Consumer(f"{name}.proj", -1, unit_index(count, width)),
            after_cut=(Attribute(name, "num_heads"), Attribute(name, "attn_dim", per_unit=width)),
            pairwise_features=2 * width,
        )


class GroupedModel(_HandMade):
    """KV groups: a key head, a value head, and all the query heads that read them."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        return tuple(self._groups(i, layer) for i, layer in enumerate(self.network.layers))  # type: ignore[arg-type]

    def _groups(self, i: int, layer: GroupedQueryAttention) -> UnitGroup:
        count, width, name = layer.kv_heads, layer.head_width, f"layers.{i}"
        queries = unit_index(count, layer.queries_per_kv * width)
        return UnitGroup(
            name=f"{name}.kv_groups",
            kind="kv_group",
            layer=i,
            count=count,
            width=layer.queries_per_kv * width,
            producers=(
                *rows(self.network, f"{name}.q_proj", queries),
                *rows(self.network, f"{name}.k_proj", unit_index(count, width)),
                *rows(self.network, f"{name}.v_proj", unit_index(count, width)),
            ),
            consumer=Consumer(f"{name}.o_proj", -1, queries),
            after_cut=(Attribute(name, "kv_heads"),),
            pairwise_features=2 * layer.queries_per_kv * width,
        )


class ConvModel(_HandMade):
    """Inner channels; `middle` is the consumer of one group and a producer of the next."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        return (
            self._channels(0, "conv1", "bn1", "conv2"),
            self._channels(1, "narrow", "bn2", "middle"),
            self._channels(1, "middle", "bn3", "wide"),
        )

    def _channels(self, layer: int, conv: str, norm: str, consumer: str) -> UnitGroup:
        count = len(self.network.get_submodule(conv).weight)  # type: ignore[arg-type]
        index = unit_index(count, 1)
        return UnitGroup(
            name=f"{conv}.channels",
            kind="channel",
            layer=layer,
            count=count,
            width=1,
            producers=(*rows(self.network, conv, index), *rows(self.network, norm, index)),
            consumer=Consumer(consumer, 1, index),
        )


def fused_model() -> FusedModel:
    """Two layers of four heads."""
    network = TokenNetwork([FusedAttention(), FusedAttention()])
    return FusedModel(stirred(network), Recipe("tests.modules.fused_model", {}))


def grouped_model() -> GroupedModel:
    """Two layers of three KV heads under six query heads."""
    network = TokenNetwork([GroupedQueryAttention(), GroupedQueryAttention()])
    return GroupedModel(stirred(network), Recipe("tests.modules.grouped_model", {}))


def conv_model() -> ConvModel:
    """A basic and a bottleneck block."""
    return ConvModel(stirred(ConvBlock()), Recipe("tests.modules.conv_model", {}))
