"""Small segmentation data sets in their usual layouts, and small models that name every pixel's class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import relu

from models.base import Batch, Consumer, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.preprocessing import ImagePreprocessing
from utils.training import Training

FORM = ImagePreprocessing((3, 32, 64), (0.5,) * 3, (0.25,) * 3, "bilinear")
SIZES = ((40, 52), (36, 70), (48, 48), (30, 64), (44, 60))  # height, width
# what a pixel of each class looks like
COLOURS = np.random.default_rng(0).integers(0, 255, (256, 3))


def scene(number: int, values: list[int], size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    """An image of a few rectangles, and the value of each pixel's label, (H, W) uint8."""
    draw = np.random.default_rng(number)
    labels = np.full(size, values[0], dtype=np.uint8)
    for _ in range(5):
        top, left = draw.integers(0, size[0] - 8), draw.integers(0, size[1] - 8)
        labels[top : top + draw.integers(6, 20), left : left + draw.integers(6, 30)] = draw.choice(values)
    noise = draw.integers(-20, 20, (*size, 3))
    return Image.fromarray(np.clip(COLOURS[labels] + noise, 0, 255).astype(np.uint8)), labels


def write_ade20k(root: Path, train: int = 6, validation: int = 5, values: tuple[int, ...] = (0, 1, 2, 3, 150)) -> Path:
    """Pairs of five sizes in ADE20K's layout."""
    for split, count, first in (("training", train, 100), ("validation", validation, 0)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, labels = scene(first + number, list(values), SIZES[number % len(SIZES)])
            image.save(root / f"images/{split}/ADE_{number:04}.jpg", quality=95)
            Image.fromarray(labels).save(root / f"annotations/{split}/ADE_{number:04}.png")
    return root


def write_cityscapes(root: Path, train: int = 5, validation: int = 3, ending: str = "labelIds") -> Path:
    """Pairs of two cities in Cityscapes' layout."""
    values = [0, 7, 11, 26, 33] if ending == "labelIds" else [255, 0, 2, 13, 18]
    for split, count, first in (("train", train, 100), ("val", validation, 0)):
        for number in range(count):
            city = ("aachen", "bochum")[number % 2]
            folders = [root / kind / split / city for kind in ("leftImg8bit", "gtFine")]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            image, labels = scene(first + number, values, (32, 64))
            name = f"{city}_{number:06}_000019"
            image.save(folders[0] / f"{name}_leftImg8bit.png")
            Image.fromarray(labels).save(folders[1] / f"{name}_gtFine_{ending}.png")
    return root


class Body(nn.Module):
    """Two convolutions at a quarter of the resolution."""

    def __init__(self, outputs: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, channels, 4, stride=4)
        self.outer = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(relu(self.inner(x)))


class Pixelwise(nn.Module):
    """Class logits of every pixel, or the features that queries make masks of."""

    def __init__(self, outputs: int, channels: int, queries: int = 0) -> None:
        super().__init__()
        self.body = Body(outputs, channels)
        self.queries = nn.Parameter(torch.randn(queries, outputs)) if queries else None
        self.of_query = nn.Linear(outputs, outputs) if queries else None

    def forward(self, x: Tensor) -> Tensor:
        dense = self.body(x)  # (B, C, h, w)
        if self.queries is None or self.of_query is None:
            return dense
        masks = torch.einsum("qc,bchw->bqhw", self.queries, dense).flatten(2)
        classes = self.of_query(self.queries + dense.mean(dim=(2, 3))[:, None])  # (B, Q, C + 1)
        return torch.cat((classes, masks), dim=-1)


class Segmenter(PrunableModel):
    """Its units are the channels between the convolutions."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        index = unit_index(len(self.network.get_parameter("body.inner.weight")), 1)
        producers = rows(self.network, "body.inner", index)
        return (UnitGroup("inner", "channel", 0, len(index), 1, producers, Consumer("body.outer", 1, index)),)

    def blocks(self) -> tuple[str, ...]:
        return ("body",)

    def feature_points(self) -> tuple[str, ...]:
        return ("body",)

    def logits(self, batch: Batch) -> Tensor:
        return self.network(batch["inputs"])


def segmenter(
    *, classes: int = 19, channels: int = 12, queries: int = 0, training: Training | None = None
) -> Segmenter:
    """A dense head, or with `queries` one of queries with masks."""
    torch.manual_seed(0)
    recipe = Recipe("tests.segmenters.segmenter", {"classes": classes, "channels": channels, "queries": queries})
    network = Pixelwise(classes + 1 if queries else classes, channels, queries)
    model = Segmenter(network, recipe, training)
    model.preprocessing, model.has_weights = FORM, True
    return model
