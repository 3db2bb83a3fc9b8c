"""MACs of a model as an exact function of how many tokens each half of each block gets.

For n tokens in the attention and m in the MLP of a block: `a n + p n^2 + c m`, where a and c are the
weights of the half's linears and p the features of its token-by-token products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.base import Batch, PrunableModel, UnitGroup
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
    """

    attention: int
    pairs: int
    mlp: int
    match: int


@dataclass(frozen=True)
class TokenCosts:
    """Exact integer MACs of one sample; pure, so a search may call it freely.

    Attributes:
        fixed: What does not depend on the tokens in the blocks: embedding and head.
        blocks: One entry a block.
        tokens: Tokens that enter the first block.
        protected: Of these, the ones in front that are never merged.
    """

    fixed: int
    blocks: tuple[BlockCosts, ...]
    tokens: int
    protected: int

    def total(self, attention: Sequence[int], mlp: Sequence[int]) -> int:
        """MACs with these token counts per block; matching is apart, see `matching`."""
        rows = zip(self.blocks, attention, mlp, strict=True)
        return self.fixed + sum(b.attention * n + b.pairs * n * n + b.mlp * m for b, n, m in rows)

    def counts(self, reduction: Reduction) -> list[tuple[int, int]]:
        """Tokens that enter the attention and the MLP of each block under a schedule."""
        reduction.refuse_misfit(len(self.blocks))
        return counts(reduction, self.tokens, self.protected)

    def of(self, reduction: Reduction) -> int:
        """MACs under a schedule, without matching."""
        attention, mlp = zip(*self.counts(reduction), strict=True)
        return self.total(attention, mlp)

    def matching(self, reduction: Reduction) -> int:
        """MACs of comparing even with odd tokens, in the blocks that merge any."""
        entering = [self.tokens, *(left for _, left in self.counts(reduction))]
        # before the attention, keys are those of the block before
        shift = int(reduction.before == "attention")
        return sum(
            self.blocks[layer - shift].match * (n // 2) * ((n + 1) // 2)
            for layer, (n, left) in enumerate(zip(entering, entering[1:], strict=False))
            if left < n
        )


def why_no_token_costs(model: PrunableModel) -> str | None:
    """Why a model has no such costs, in one line; None if it has."""
    layers = [group.layer for group in model.unit_groups() if group.pairwise_features]
    if reason := model.why_not_mergeable():
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
    return TokenCosts(fixed, blocks, calls[heads[0].consumer.module][0], model.protected_tokens)


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
    )
