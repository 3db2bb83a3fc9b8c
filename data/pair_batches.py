"""Batches of images and label maps in the form that a model reads.

Shapes: B samples, (H, W) the model's input, (h, w) its masks.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from data.base import Batch, divided_rows
from data.images import AUGMENTATION, generator_of, one_pass
from data.label_maps import IGNORED
from data.pairs import Pairs, read_pair
from models.preprocessing import ImagePreprocessing
from utils.errors import InputError

Box = tuple[float, float, float, float]
Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Form:
    """How a model wants images, and the size of its masks.

    Attributes:
        images: Its preprocessing; images are scaled whole, so that its crop is not used.
        mask_size: (h, w).
    """

    images: ImagePreprocessing
    mask_size: tuple[int, int]

    def sample(self, image: Image.Image, labels: np.ndarray, small: bool, drawn: torch.Generator | None) -> Sample:
        """Make a sample of a pair.

        Args:
            image: RGB.
            labels: Of the image's size, uint8.
            small: Whether labels come at the masks' size; else at their own.
            drawn: Source of augmentation: the same part of both, mirrored or not; None for the whole.

        Returns:
            The image (3, H, W) float32, and labels (h, w) or as they are, uint8.
        """
        box: Box = (0.0, 0.0, float(image.width), float(image.height))
        mirrored = False
        if drawn is not None:
            box, mirrored = drawn_part(image.size, drawn), bool(torch.rand((), generator=drawn) < 0.5)
        picture = self._picture(image, box)
        if small:
            size = (self.mask_size[1], self.mask_size[0])
            labels = np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box))
        found = torch.from_numpy(labels)
        return (picture.flip(-1), found.flip(-1)) if mirrored else (picture, found)

    def _picture(self, image: Image.Image, box: Box) -> Tensor:
        height, width = self.images.input_size[1:]
        pixels = image.resize((width, height), str_to_pil_interp(self.images.interpolation), box)
        scaled = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255  # (H, W, 3) -> (3, H, W)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.images.mean, self.images.std))
        return (scaled - mean) / std


def drawn_part(size: tuple[int, int], generator: torch.Generator) -> Box:
    """A random part of an image in its own proportions, as left, top, right, bottom."""
    low, high = AUGMENTATION["scale"]
    area, across, down = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = (low + (high - low) * area) ** 0.5
    width, height = side * size[0], side * size[1]
    left, top = across * (size[0] - width), down * (size[1] - height)
    return left, top, min(left + width, size[0]), min(top + height, size[1])


class PairBatches:
    """Batches of pairs; shuffled and augmented anew each epoch if a seed is given.

    Epoch k of one seed is always the same, whatever was drawn before and however many processes decode. Training
    labels come at the masks' size; others at their own, padded to the largest of the batch, with their `sizes`.
    """

    def __init__(
        self, pairs: Pairs, form: Form, batch_size: int, workers: int | None = None, shuffle_seed: int | None = None
    ) -> None:
        self.pairs, self.form, self.batch_size = pairs, form, batch_size
        self.workers, self.shuffle_seed, self.epoch = workers, shuffle_seed, 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield {"inputs": (B, 3, H, W) float32, "labels": (B, h, w) int64}, or with labels of their own sizes."""
        order, key = torch.arange(len(self.pairs)), f"{self.shuffle_seed}/{self.epoch}"
        if self.shuffle_seed is None:
            return pair_batches(self.pairs, self.form, order, self.batch_size, self.workers)
        order = torch.randperm(len(self.pairs), generator=generator_of(key))
        return pair_batches(self.pairs, self.form, order, self.batch_size, self.workers, True, key)

    def divided(self, share: float, seed: int) -> tuple["PairBatches", "PairBatches"]:
        """Batches of all pairs but a share, and batches of that share."""
        rest, held = divided_rows(len(self.pairs), share, seed)
        return self._of(rest), self._of(held)

    def _of(self, rows: Tensor) -> "PairBatches":
        twin = copy.copy(self)
        twin.pairs = self.pairs.some(rows.tolist())
        return twin


def pair_batches(
    pairs: Pairs, form: Form, order: Tensor, batch_size: int, workers: int | None, small: bool = False, key: str = ""
) -> Iterator[Batch]:
    """Go once over pairs.

    Args:
        pairs: What is read.
        form: What is made of it.
        order: Numbers of the pairs, (n,) int64.
        batch_size: Pairs in a batch.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        small: Whether labels come at the masks' size.
        key: What augmentation is drawn by; empty for none.

    Raises:
        InputError: If a pair can't be used.
    """
    for batch in one_pass(_Samples(pairs, form, small, key), order, batch_size, workers, _collated):
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


class _Samples(Dataset):
    """One pass over pairs: a sample, or why there is none."""

    def __init__(self, pairs: Pairs, form: Form, small: bool, key: str) -> None:
        self.pairs, self.form, self.small, self.key = pairs, form, small, key

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool] | str:
        try:
            image, labels = read_pair(self.pairs, index)
        except InputError as error:  # raised in a worker it would arrive with a traceback for a message
            return str(error)
        drawn = generator_of(f"{self.key}/{index}") if self.key else None
        return *self.form.sample(image, labels, self.small, drawn), self.small


def _collated(samples: Sequence[tuple[Tensor, Tensor, bool] | str]) -> Batch | str:
    found = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        found.append(sample)
    inputs, labels, small = zip(*found, strict=True)
    sizes = torch.tensor([one.shape for one in labels])  # (B, 2)
    height, width = sizes.amax(dim=0).tolist()
    padded = [pad(one, (0, width - one.shape[1], 0, height - one.shape[0]), value=IGNORED) for one in labels]
    batch = {"inputs": torch.stack(inputs), "labels": torch.stack(padded).long()}
    return batch if small[0] else batch | {"sizes": sizes}
