"""How many tokens each block merges away: pure functions from settings to a list with one entry a block."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

from models.merging import Reduction, mergeable
from models.token_cost import TokenCosts
from prune.budget import Budget
from utils.errors import InputError

Schedule = tuple[int, ...]


def linear(r: int, inflection: float, blocks: int) -> Schedule:
    """From `r (1 - inflection)` in the first block to `r (1 + inflection)` in the last, rounded down.

    Args:
        r: Mean over the blocks, before rounding.
        inflection: In [-1, 1]: -1 falls to 0, 0 is constant, 1 rises from 0.
        blocks: Number of blocks, L.
    """
    first = floor(r * (1 - Fraction(str(inflection))))
    step = Fraction(2 * (r - first), max(blocks - 1, 1))
    return tuple(floor(first + layer * step) for layer in range(blocks))


def listed(merged: Sequence[int], blocks: int) -> Schedule:
    """An explicit list, padded with zeros.

    Raises:
        InputError: If it has more entries than there are blocks.
    """
    if len(merged) > blocks:
        raise InputError(f"prune.r={list(merged)}: has {len(merged)} entries, the model has {blocks} blocks")
    return (*merged, *[0] * (blocks - len(merged)))


def even(total: int, blocks: int) -> Schedule:
    """The same number in every block, and one more in the first ones, until `total` are given out."""
    each, more = divmod(total, blocks)
    return tuple(each + (layer < more) for layer in range(blocks))


def reachable(merged: Schedule, tokens: int, protected: int, min_tokens: int) -> Schedule:
    """What of a schedule can be done: as many pairs as there are, and never below a floor.

    Args:
        merged: Tokens to merge away per block.
        tokens: Tokens that enter the first block.
        protected: Of these, those that are never merged.
        min_tokens: Tokens left at least after every block.
    """
    done = []
    for r in merged:
        done.append(min(r, mergeable(tokens, protected), max(tokens - min_tokens, 0)))
        tokens -= done[-1]
    return tuple(done)


def from_ratio(costs: TokenCosts, total: int, ratio: float, min_tokens: int) -> Schedule:
    """The smallest even schedule that removes at least a fraction of a model's MACs.

    More tokens merged anywhere leave fewer in every later block, so the MACs fall along the
    schedules and bisection finds the first one within the budget.

    Args:
        costs: The model's MACs as a function of its tokens.
        total: MACs of the model as it is.
        ratio: Fraction to remove.
        min_tokens: Tokens left at least after every block.

    Raises:
        InputError: If no schedule removes that much; it names the largest ratio that can be had.
    """
    blocks, limit = len(costs.blocks), Budget("macs", ratio).limit(total)

    def at(given: int) -> tuple[int, Schedule]:
        merged = reachable(even(given, blocks), costs.tokens, costs.protected, min_tokens)
        return costs.of(Reduction(merged)), merged

    low, high = 0, blocks * mergeable(costs.tokens, costs.protected)
    if (least := at(high)[0]) > limit:
        largest = floor(10_000 * (1 - least / total)) / 10_000
        raise InputError(
            f"prune.ratio={ratio}: would leave {limit:,} of {total:,} macs of the model, but merging tokens down to "
            f"prune.min_tokens={min_tokens} leaves at least {least:,}; prune.ratio must be at most {largest:g}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle)[0] <= limit else (middle + 1, high)
    return at(low)[1]
