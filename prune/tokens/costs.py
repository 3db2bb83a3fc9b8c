"""What a model's tokens cost once units have gone from its blocks, without cutting it."""

from collections.abc import Mapping
from dataclasses import replace

from models.base import PrunableModel, UnitGroup
from models.token_cost import TokenCosts


def weights_per_unit(model: PrunableModel, group: UnitGroup) -> int:
    """Weights that go with one unit of a group, biases not counted: its MACs per token."""
    held = [part for part in group.slices if part.tensor.endswith(".weight")]
    sizes = [model.network.get_parameter(part.tensor).select(part.dim, 0).numel() for part in held]
    return sum(size * part.index.shape[1] for size, part in zip(sizes, held, strict=True)) if group.count else 0


def cut_costs(costs: TokenCosts, model: PrunableModel, kept: Mapping[str, int]) -> TokenCosts:
    """Costs of the model with so many units kept per group.

    Args:
        costs: Those of the model as it is.
        model: The model.
        kept: Units kept; groups not named stay whole.
    """
    blocks = list(costs.blocks)
    for group in model.unit_groups():
        gone = group.count - kept.get(group.name, group.count)
        block, weights = blocks[group.layer], gone * weights_per_unit(model, group)
        if group.pairwise_features:
            pairs = block.pairs - gone * group.pairwise_features
            keys = block.keys - gone * group.key_weights
            blocks[group.layer] = replace(block, attention=block.attention - weights, pairs=pairs, keys=keys)
        else:
            blocks[group.layer] = replace(block, mlp=block.mlp - weights)
    return replace(costs, blocks=tuple(blocks))
