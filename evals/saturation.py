"""Finding the batch at which a device is busy: twice as many samples until there is nothing to gain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GAIN = 0.05
PATIENCE = 2


@dataclass(frozen=True)
class Saturation:
    """What a search found.

    Attributes:
        batch: The smallest batch within 5% of the best rate; 1 if not even that could be run.
        tried: Every batch with its samples per second; None: out of memory.
    """

    batch: int
    tried: tuple[tuple[int, float | None], ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The batches tried, as plain values."""
        return [
            {"batch": batch, "samples_per_s": rate, **({"reason": "out of memory"} if rate is None else {})}
            for batch, rate in self.tried
        ]


def saturating_batch(rate: Callable[[int], float | None], largest: int) -> Saturation:
    """Double the batch until two doublings in a row gain less than 5% each, or memory ends.

    Args:
        rate: Samples per second at a batch; None where it does not fit.
        largest: Batch to stop at.
    """
    tried: list[tuple[int, float | None]] = []
    batch, best, without = 1, 0.0, 0
    while batch <= largest and without < PATIENCE:
        found = rate(batch)
        tried.append((batch, found))
        if found is None:
            break
        without = 0 if found > (1 + GAIN) * best else without + 1
        best = max(best, found)
        batch *= 2
    return Saturation(_smallest(tried, best), tuple(tried))


def _smallest(tried: Sequence[tuple[int, float | None]], best: float) -> int:
    return next((batch for batch, rate in tried if rate is not None and rate * (1 + GAIN) >= best), 1)
