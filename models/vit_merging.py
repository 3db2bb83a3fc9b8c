"""Timm's vision transformers with tokens merged or dropped on their way: the same weights under other forwards.

Shapes: B samples, T tokens, Q tokens that are asked for (all, or in the last block those in front), D width, H heads,
dh head width.
"""

from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.keeping import Keeping
from models.keeping_flow import KeepingFlow
from models.merging import Reduction
from models.merging_flow import Flow, FrontQueries
from models.recast import recast


class ReducingAttention(Attention):
    """Timm's attention among tokens of which some are merged or gone; the flow mixes them."""

    flow: Flow | KeepingFlow

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, D) to (B, Q, D)."""
        shape = (3, self.num_heads, self.head_dim)
        parts = self.qkv(x).unflatten(-1, shape)  # (B, T, 3*H*dh) -> (B, T, 3, H, dh)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, dh)
        asking = self.flow.asking(x)  # (B, Q, D)
        q, k = self.q_norm(q[:, :, : asking.shape[1]]), self.k_norm(k)
        mixed = self.flow.attend(q, k, v, self.scale, lambda bias: self._mixed(q, k, v, bias))
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))  # (B, H, Q, dh) -> (B, Q, H*dh)
        if self.gate is not None:
            mixed = mixed * self.gate(asking).sigmoid()
        return self.proj_drop(self.proj(mixed))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        scores = (q * self.scale) @ k.mT
        scores = scores if bias is None else scores + bias
        return self.attn_drop(scores.softmax(dim=-1)) @ v


class ReducingBlock(Block):
    """Timm's pre-norm block, with fewer tokens from one of its halves on."""

    flow: Flow | KeepingFlow
    layer: int

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, D) to (B, T - r, D), or to (B, Q, D) where it asks for the tokens in front alone."""
        x = self.flow.enter(x, self.layer)
        x = self.flow.asking(x) + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = self.flow.leave_attention(x)
        return self.flow.leave(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class ReducingResPostBlock(ResPostBlock):
    """Timm's block that normalises what is added, with fewer tokens from one of its halves on."""

    flow: Flow | KeepingFlow
    layer: int

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, D) to (B, T - r, D), or to (B, Q, D) where it asks for the tokens in front alone."""
        x = self.flow.enter(x, self.layer)
        x = self.flow.asking(x) + self.drop_path1(self.norm1(self.attn(x)))
        x = self.flow.leave_attention(x)
        return self.flow.leave(x + self.drop_path2(self.norm2(self.mlp(x))))


class AveragingVisionTransformer(VisionTransformer):
    """Timm's vision transformer that averages patches, each token counted by its size."""

    flow: Flow | KeepingFlow

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        if pool_type not in (None, "avg"):
            return super().pool(x, pool_type)
        return self.flow.mean(x, 0 if self.pool_include_prefix else self.num_prefix_tokens)


def why_not_mergeable(network: VisionTransformer) -> str | None:
    """Why tokens of a network can't be merged, in one line; None if they can."""
    pool = network.global_pool
    if pool not in ("token", "avg"):
        return f"global_pool={pool or 'none'} does not count a merged token by its size; token and avg do"
    if pool == "avg" and type(network) not in (VisionTransformer, AveragingVisionTransformer):
        return f"it averages tokens in a way of its own ({type(network).__name__})"
    return None


def reads_front(network: VisionTransformer) -> bool:
    """Whether the head reads class, distillation and register tokens alone."""
    return network.global_pool == "token" and type(network) in (VisionTransformer, VisionTransformerDistilled)


def merging(network: VisionTransformer, reduction: Reduction) -> VisionTransformer:
    """The same weights as a network that merges tokens; the one given must not be used any more."""
    return _reducing(network, Flow(reduction, network.num_prefix_tokens, network.global_pool == "avg"))


def dropping(network: VisionTransformer, keeping: Keeping) -> VisionTransformer:
    """The same weights as a network that drops tokens; the one given must not be used any more."""
    return _reducing(network, KeepingFlow(keeping, network.num_prefix_tokens))


def _reducing(network: VisionTransformer, flow: Flow | KeepingFlow) -> VisionTransformer:
    for layer, block in enumerate(network.blocks):
        kind = ReducingResPostBlock if isinstance(block, ResPostBlock) else ReducingBlock
        network.blocks[layer] = recast(block, kind, flow=flow, layer=layer)
        network.blocks[layer].attn = attention = recast(block.attn, ReducingAttention, flow=flow)  # type: ignore
        kind, front = (FrontQueries, {"front": flow.protected}) if flow.in_front(layer) else (nn.Linear, {})
        if type(attention.qkv) is not kind:
            attention.qkv = recast(attention.qkv, kind, **front)
    averaged = network.global_pool == "avg"
    return recast(network, AveragingVisionTransformer, flow=flow) if averaged else network
