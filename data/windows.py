"""How calibration windows are drawn for pruning language models: pure functions of texts and a seed.

Starts are uniform over [0, T - L - 1], both ends included and with replacement, drawn by `random.Random(seed)`
(the recipe of SparseGPT, Frantar and Alistarh, arXiv:2301.00774, and Wanda, Sun et al., arXiv:2306.11695); so the
same seed gives the same windows as theirs. T tokens of a text, L tokens of a window, N windows.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from utils.errors import InputError

KEY = "data.calibration_length"


def stream_windows(tokens: Tensor, samples: int, length: int, seed: int, source: str, key: str = KEY) -> Tensor:
    """Draw windows from one long stream.

    Args:
        tokens: The stream, (T,).
        samples: Windows, N.
        length: Tokens of each, L.
        seed: Of the draws.
        source: What the stream is, for the message.
        key: What the length is called, for the message.

    Returns:
        (N, L).

    Raises:
        InputError: If the stream is not longer than a window.
    """
    if len(tokens) <= length:
        raise InputError(f"{key}={length}: must be below {len(tokens)}, all tokens that {source} has")
    draw = Random(seed)
    starts = [draw.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    return torch.stack([tokens[start : start + length] for start in starts])


def document_windows(
    texts: Sequence[str],
    encode: Callable[[str], Tensor],
    samples: int,
    length: int,
    seed: int,
    source: str,
    key: str = KEY,
) -> Tensor:
    """Draw a document until it is longer than a window, then a window of it; again for each window.

    Args:
        texts: The documents.
        encode: Tokens of one, (T,).
        samples: Windows, N.
        length: Tokens of each, L.
        seed: Of the draws.
        source: What the documents are, for the message.
        key: What the length is called, for the message.

    Returns:
        (N, L).

    Raises:
        InputError: If no document is long enough.
    """
    draw, read = Random(seed), dict[int, Tensor]()

    def long_document() -> Tensor:
        while True:
            number = draw.randint(0, len(texts) - 1)
            if number not in read:
                read[number] = encode(texts[number])
            if len(read[number]) > length:
                return read[number]
            if len(read) == len(texts) and (longest := max(map(len, read.values()))) <= length:
                raise InputError(f"{key}={length}: must be below {longest}, the longest document of {source}")

    if not texts:
        raise InputError(f"{source} holds no documents to draw calibration windows from")
    windows = []
    for _ in range(samples):
        tokens = long_document()
        start = draw.randint(0, len(tokens) - length - 1)
        windows.append(tokens[start : start + length])
    return torch.stack(windows)
