"""MACs of a model as an exact function of how many tokens each half of each block gets.

For n tokens in the attention and m in the MLP of a block: `a n + p n^2 + c m`, where a and c are the
weights of the half's linears and p the features of its token-by-token products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.base import Batch, PrunableModel, UnitGroup
from models.keeping import Keeping
from models.merging import Reduction, counts
from models.positions import positions_per_call


@dataclass(frozen=True)
class BlockCosts:
    """What one block costs.

    Attributes:
        attention: MACs per token of the linears of the attention half.
        pairs: MACs per pair of tokens.
        mlp: MACs per token of the other linears.
        match: Features by which tokens are matched: those of one key, or the tokens' own where no head is left.
        width: Features of a token.
        keys: Of the MACs per token of the attention half, those for keys and values.
    """

    attention: int
    pairs: int
    mlp: int
    match: int
    width: int = 0
    keys: int = 0

    def unasked(self, tokens: int, asking: int) -> int:
        """MACs of its attention half that go where only some of the tokens ask, and all are keys and values."""
        return (self.attention - self.keys + self.pairs * tokens) * (tokens - asking)


@dataclass(frozen=True)
class TokenCosts:
    """Exact integer MACs of one sample; pure, so a search may call it freely.

    Attributes:
        fixed: What does not depend on the tokens in the blocks: embedding and head.
        blocks: One entry a block.
        tokens: Tokens that enter the first block.
        protected: Of these, the ones that are never merged or dropped.
        class_token: Whether the first token is the one that the answer is read from.
        ragged: Whether samples differ in length, so that these are the costs of one of many.
        reads_front: Whether the answer depends on the protected tokens alone.
    """

    fixed: int
    blocks: tuple[BlockCosts, ...]
    tokens: int
    protected: int
    class_token: bool = False
    ragged: bool = False
    reads_front: bool = False

    def total(self, attention: Sequence[int], mlp: Sequence[int]) -> int:
        """MACs with these token counts per block; matching is apart, see `matching`."""
        rows = zip(self.blocks, attention, mlp, strict=True)
        return self.fixed + sum(b.attention * n + b.pairs * n * n + b.mlp * m for b, n, m in rows)

    def totals(self, counts: Tensor) -> Tensor:
        """The same for many samples at once: token counts (B, L, 2) -> MACs (B,), int64."""
        rows = torch.tensor([[b.attention, b.pairs, b.mlp] for b in self.blocks], device=counts.device)  # (L, 3)
        n, m = counts.long().unbind(-1)  # (B, L)
        return self.fixed + (rows[:, 0] * n + rows[:, 1] * n * n + rows[:, 2] * m).sum(1)

    def counts(self, reduction: Reduction | Keeping) -> list[tuple[int, int]]:
        """Tokens that enter the attention and the MLP of each block under a schedule."""
        reduction.refuse_misfit(len(self.blocks))
        if isinstance(reduction, Keeping):
            return reduction.counts(self.tokens, self.protected)
        return counts(reduction, self.tokens, self.protected)

    def of(self, reduction: Reduction | Keeping) -> int:
        """MACs under a schedule, without matching or scoring."""
        attention, mlp = zip(*self.counts(reduction), strict=True)
        spared = 0
        if isinstance(reduction, Reduction) and reduction.front_only:
            spared = self.blocks[-1].unasked(attention[-1], self.protected)
        return self.total(attention, mlp) - spared

    def scoring(self, keeping: Keeping, counts: Sequence[tuple[int, int]], fused: Mapping[int, int]) -> int:
        """MACs of what a rule must see beyond the forward pass.

        One row of the attention; all rows where samples are packed, whose kernel shows none; and fused tokens.

        Args:
            keeping: The rule and where it acts.
            counts: Tokens that enter the attention and the MLP of each block.
            fused: Tokens of which each block made a fused one, by its position.
        """
        found, packed = sum(self.blocks[layer].width * tokens for layer, tokens in fused.items()), False
        for step, layer in enumerate(keeping.layers):
            if keeping.rule.idle(step):
                continue
            block, (n, _) = self.blocks[layer], counts[layer]
            found += block.pairs // 2 * n * ("attention" in keeping.rule.needs)
            found += block.pairs // 2 * n * n * (packed and "received" in keeping.rule.needs)
            packed = keeping.batching == "pack"
        return found

    def matching(self, reduction: Reduction) -> int:
        """MACs of comparing even with odd tokens, and of asking the class token, in the blocks that merge any."""
        flowing = self.counts(replace(reduction, front_only=False))
        entering = [self.tokens, *(left for _, left in flowing)]
        # before the attention, keys are those of the block before
        shift = int(reduction.before == "attention")
        found = 0
        for layer, (n, left) in enumerate(zip(entering, entering[1:], strict=False)):
            if left < n:
                block = self.blocks[layer - shift]
                features = block.match if reduction.metric == "keys" else block.width
                found += features * (n // 2) * ((n + 1) // 2)
                found += block.pairs // 2 * n * bool(reduction.importance)
        return found


def why_no_token_costs(model: PrunableModel, dropped: bool = False) -> str | None:
    """Why a model whose tokens are merged, or dropped, has no such costs, in one line; None if it has."""
    layers = [group.layer for group in model.unit_groups() if group.pairwise_features]
    if reason := model.why_not_droppable() if dropped else model.why_not_mergeable():
        return reason
    return None if layers == list(range(len(model.blocks()))) else "not every block has one attention"


def token_costs(model: PrunableModel, example: Batch) -> TokenCosts:
    """Derive the costs of a model as it is, cut or not, from one forward pass.

    Args:
        model: A model that has them (`why_no_token_costs`); left as it was.
        example: A batch of one sample.
    """
    return token_costs_of(model, positions_per_call(model, example))


def token_costs_of(model: PrunableModel, calls: Mapping[str, Sequence[int]]) -> TokenCosts:
    """The same from the positions at which each linear and convolution runs (`positions_per_call`).

    The linears of the attention half are the producers and the consumer of a block's units with
    token-by-token products; those of the MLP half all others in the block.
    """
    sizes = {name: model.network.get_parameter(f"{name}.weight").numel() for name in calls}
    heads = [_heads_of(model, layer) for layer in range(len(model.blocks()))]
    blocks = tuple(_block_costs(model, block, group, sizes) for block, group in zip(model.blocks(), heads, strict=True))
    inside = tuple(f"{block}." for block in model.blocks())
    fixed = sum(sum(calls[name]) * size for name, size in sizes.items() if not name.startswith(inside))
    tokens = calls[heads[0].keys_from or heads[0].consumer.module][0]
    return TokenCosts(fixed, blocks, tokens, model.protected_tokens, model.class_token, reads_front=model.reads_front)


def _heads_of(model: PrunableModel, layer: int) -> UnitGroup:
    (group,) = (g for g in model.unit_groups() if g.layer == layer and g.pairwise_features)
    return group


def _block_costs(model: PrunableModel, block: str, heads: UnitGroup, sizes: Mapping[str, int]) -> BlockCosts:
    names = {part.tensor.rpartition(".")[0] for part in heads.slices}
    inside = {name: size for name, size in sizes.items() if name.startswith(f"{block}.")}
    attention = sum(size for name, size in inside.items() if name in names)
    width = model.network.get_parameter(f"{heads.consumer.module}.weight").shape[0]
    return BlockCosts(
        attention=attention,
        pairs=heads.pairwise_features * heads.count,
        mlp=sum(inside.values()) - attention,
        match=heads.width if heads.count else width,
        width=width,
        keys=heads.key_weights * heads.count,
    )
