"""What turns raw text and images into a model's inputs; it comes with the model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextPreprocessing:
    """A language model's tokenizer, and what else its data must know.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        longest: Most tokens that the model can take, special ones included.
        labels: Names of the model's outputs in order; empty where they have none of their own.
        ends: Tokens that end a text; models tuned to talk have several.
    """

    tokenizer: Any
    longest: int
    labels: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImagePreprocessing:
    """How a vision model wants its images, in timm's terms.

    Attributes:
        input_size: Channels, height and width in pixels.
        mean: Per channel, subtracted from values in [0, 1].
        std: Per channel, divided by afterwards.
        interpolation: `bicubic`, `bilinear`, …
        crop_pct: Side of the centre crop as a fraction of the resized image's.
        crop_mode: `center`, `squash` or `border`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
