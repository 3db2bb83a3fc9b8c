"""MACs of a batch whose samples keep different numbers of tokens, as integers: mask, pad or pack.

For a plain encoder (attention, two-layer MLP, a head on every token). Shapes: B samples, n tokens of each,
D width, F neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Batching = Literal["mask", "pad", "pack"]
# fvcore counts five operations an element of a layer norm
FVCORE_NORM = 5


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a plain encoder.

    Attributes:
        width: Features of a token, D.
        neurons: Neurons of each MLP, F.
        depth: Layers, with two norms each.
        outputs: Features of the head, which reads every token.
    """

    width: int
    neurons: int
    depth: int
    outputs: int = 0

    @property
    def per_token(self) -> int:
        """MACs of the layers' linears a token: four projections and the MLP."""
        return self.depth * (4 * self.width**2 + 2 * self.width * self.neurons)

    @property
    def per_pair(self) -> int:
        """MACs of the attention products a pair of tokens."""
        return self.depth * 2 * self.width

    def macs(self, tokens: int, pairs: int) -> int:
        """MACs at so many tokens, of which so many pairs attend: `tokens (linears + head) + pairs * products`."""
        return tokens * (self.per_token + self.width * self.outputs) + pairs * self.per_pair

    def fvcore_flops(self, tokens: int) -> int:
        """What fvcore calls FLOPs: MACs of the linears and five an element of each norm, without the products."""
        norms = FVCORE_NORM * 2 * self.depth * self.width
        return tokens * (self.per_token + norms + self.width * self.outputs)


def executed(lengths: Sequence[int], padded: int, batching: Batching) -> tuple[int, int]:
    """Tokens that linears compute and pairs that attention computes.

    Args:
        lengths: Tokens that each sample keeps.
        padded: Tokens of each sample before any went.
        batching: `mask` computes all of them, `pad` the longest sample's for every one, `pack` those kept.
    """
    alike = {"mask": padded, "pad": max(lengths, default=0)}.get(batching)
    counts = list(lengths) if alike is None else [alike] * len(lengths)
    return sum(counts), sum(n * n for n in counts)


def padding_waste(lengths: Sequence[int]) -> float:
    """Share of a padded batch that is padding: `1 - sum n / (B max n)`."""
    longest = max(lengths, default=0)
    return 1 - sum(lengths) / (len(lengths) * longest) if longest else 0.0
