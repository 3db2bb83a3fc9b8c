"""Ranks inside short groups of scores: the bytes of one integer a group.

Everything runs along whole rows of memory, so that nothing is brought into another order.
"""

from collections.abc import Iterable

import numpy as np

# integers of as many bytes as a group has entries
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def word_ranks(scores: np.ndarray, size: int) -> np.ndarray:
    """How many entries of its group go before each entry: the lower ones, and equal ones of a lower index.

    Every entry is compared with the one `apart` places behind it, for every distance inside a group, along the whole
    row at once. Where the first is no larger, it goes before the other, whose rank rises by one; else its own does.

    Args:
        scores: (groups * size,), in one piece, without NaN.
        size: Entries of a group; 2, 4 or 8.

    Returns:
        (groups * size,), uint8.
    """
    before = np.zeros(scores.shape, dtype=bool)
    words = before.view(WORDS[size])
    moved = np.empty_like(words)
    # each is counted as behind all that follow it, until it is found to be no larger; bytes may borrow from each
    # other on the way, but not in the end
    ranks = np.full_like(words, _word(range(size - 1, -1, -1)))
    for apart in range(1, size):
        np.less_equal(scores[:-apart], scores[apart:], out=before[:-apart])
        # a pair of two groups counts nowhere
        words &= words.dtype.type(_word(int(place + apart < size) for place in range(size)))
        np.left_shift(words, words.dtype.type(8 * apart), out=moved)
        ranks += moved
        ranks -= words
    return ranks.view(np.uint8)


def _word(values: Iterable[int]) -> int:
    """The integer that has these bytes, the first one lowest."""
    return int.from_bytes(bytes(values), "little")
