"""DynamicViT's cost in closed form; its trained predictor is not here.

Rao et al., DynamicViT (NeurIPS 2021, arXiv:2106.02034): before three blocks a predictor scores the patches, and
`floor(patches * rho^s)` stay after stage s.
"""

from fractions import Fraction
from math import floor

from models.token_cost import TokenCosts

STAGES = (3, 6, 9)


def stage_tokens(patches: int, rho: float, stages: int = len(STAGES)) -> list[int]:
    """Patches before the first stage and after each one.

    Args:
        patches: Tokens that may go.
        rho: Share that each stage keeps, in (0, 1].
        stages: Number of stages.
    """
    share = Fraction(str(rho))
    return [floor(patches * share**stage) for stage in range(stages + 1)]


def predictor_macs(width: int, patches: int) -> int:
    """MACs of one predictor: `D^2 + D^2/2 + D^2/8 + D/2` a patch, D the width."""
    return patches * (width**2 + width**2 // 2 + width**2 // 8 + width // 2)


def dynamicvit_macs(costs: TokenCosts, width: int, rho: float, stages: tuple[int, ...] = STAGES) -> tuple[int, int]:
    """MACs of one sample in the backbone and in the predictors.

    Args:
        costs: The dense model's as a function of its tokens.
        width: Features of a token, D.
        rho: Share that each stage keeps.
        stages: Blocks that a stage comes before, from 0.
    """
    left = stage_tokens(costs.tokens - costs.protected, rho, len(stages))
    counts = [costs.protected + left[sum(block >= at for at in stages)] for block in range(len(costs.blocks))]
    return costs.total(counts, counts), sum(predictor_macs(width, patches) for patches in left[:-1])
