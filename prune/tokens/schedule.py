"""How many tokens each block merges away: pure functions from settings to a list with one entry a block."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from math import floor

from models.merging import Reduction, mergeable
from models.token_cost import TokenCosts
from prune.budget import Budget
from utils.errors import InputError, Unreachable

Schedule = tuple[int, ...]
GivenOut = tuple[Callable[[int], Schedule], int]
# how finely a share of tokens is chosen
STEPS = 1000


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
    each, more = divmod(total, max(blocks, 1))
    return tuple(each + (layer < more) for layer in range(blocks))


def tilted(total: int, inflection: float, blocks: int) -> Schedule:
    """`total` given out along a line from `1 - inflection` in the first block to `1 + inflection` in the last.

    What has been given out up to any block never falls as `total` grows.
    """
    if not inflection or blocks == 1:  # one block takes all: rising from nothing to it would give nothing out
        return even(total, blocks)
    slope = Fraction(str(inflection))
    weights = [1 + slope * (2 * Fraction(layer, max(blocks - 1, 1)) - 1) for layer in range(blocks)]
    ends = [floor(total * sum(weights[: layer + 1]) / sum(weights)) for layer in range(blocks)]
    return tuple(end - before for end, before in zip(ends, [0, *ends], strict=False))


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


def shared(steps: int, tokens: int, protected: int, blocks: int) -> Schedule:
    """The same share of what is left, `steps` of `STEPS`, from every block, at most half; the more, the fewer stay."""
    stay, left = 1 - Fraction(steps, STEPS), tokens - protected
    given = []
    for block in range(blocks):
        wanted = floor((tokens - protected) * stay ** (block + 1))
        given.append(min(max(left - wanted, 0), left // 2))
        left -= given[-1]
    return tuple(given)


def from_ratio(
    costs: TokenCosts, total: int, ratio: float, min_tokens: int, given_out: GivenOut | None = None,
    front_only: bool = False,
) -> Schedule:  # fmt: skip
    """The smallest schedule of a kind that removes at least a fraction of a model's MACs.

    More tokens merged anywhere leave fewer in every later block, so the MACs fall along the
    schedules and bisection finds the first one within the budget.

    Args:
        costs: The model's MACs as a function of its tokens.
        total: MACs of the model as it is.
        ratio: Fraction to remove.
        min_tokens: Tokens left at least after every block.
        given_out: The kind: schedules by number, none of which leaves more tokens anywhere than those before it, and
            the number of the last one. None: `even`. They have one entry less than there are blocks with `front_only`.
        front_only: Whether the last block asks for the protected tokens alone; it then merges none.

    Raises:
        Unreachable: If no schedule removes that much; it names the largest ratio that can be had.
    """
    blocks, limit = len(costs.blocks) - front_only, Budget("macs", ratio).limit(total)

    of, last = given_out or (partial(even, blocks=blocks), blocks * mergeable(costs.tokens, costs.protected))

    def at(given: int) -> tuple[int, Schedule]:
        schedule = (*of(given), 0) if front_only else of(given)
        merged = reachable(schedule, costs.tokens, costs.protected, min_tokens)
        return costs.of(Reduction(merged, front_only=front_only)), merged

    low, high = 0, last
    if (least := at(high)[0]) > limit:
        largest = floor(10_000 * (1 - least / total)) / 10_000
        raise Unreachable(
            f"prune.ratio={ratio}: would leave {limit:,} of {total:,} macs of the model, but merging tokens down to "
            f"prune.min_tokens={min_tokens} leaves at least {least:,}; prune.ratio must be at most {largest:g}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle)[0] <= limit else (middle + 1, high)
    return at(low)[1]
