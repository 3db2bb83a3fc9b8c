"""CIFAR-10 and CIFAR-100: 32x32 colour photos, from the original files or from the hub.

Shapes: N images, pixels (N, 3, 32, 32) uint8.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.base import Classification, DataBundle, TensorBatches, fingerprint_of
from data.base import calibration_batches as calibration_sample
from data.cifar_files import BINARY, PICKLED, read_pickle, read_records
from data.digits import shifted
from data.hub import hub_splits
from data.images import Loading, image_bundle, preprocessing_of
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Seed, Whole, checked

if TYPE_CHECKING:
    from models.base import PrunableModel

HUB_NAMES, HUB_LABELS = {10: "uoft-cs/cifar10", 100: "uoft-cs/cifar100"}, {10: "label", 100: "fine_label"}


@checked
def cifar(
    *,
    classes: Literal[10, 100] = 10,
    image_size: Literal[32] = 32,
    channels: Literal[3] = 3,
    root: ExistingPath | None = None,
    allow_pickle: bool = False,
    batch_size: Count = 128,
    calibration_batches: Whole = 16,
    calibration_batch_size: Count = 64,
    shift: Whole = 4,
    workers: Whole | None = None,
    seed: Seed = 0,
) -> "CifarSource":
    """Describe CIFAR; it is read once the model, which may bring transforms, is there.

    Args:
        classes: 10 for CIFAR-10, 100 for CIFAR-100 with its fine labels.
        image_size: Always 32; there for the model's configuration to refer to.
        channels: Always 3, likewise.
        root: The archive's folder, or the one that holds it; None takes the hub's.
        allow_pickle: Whether the python version may be unpickled.
        batch_size: Images per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Images in each; part of the definition of a score.
        shift: Largest random shift of training images in pixels, for a model without transforms of its own.
        workers: Processes that transform; None means up to 4, 0 works in this one. Without transforms there are none.
        seed: Seeds the order and augmentation of training and the calibration sample.
    """
    loading = Loading(batch_size, calibration_batches, calibration_batch_size, workers, seed)
    return CifarSource(classes, Path(root) if root else None, allow_pickle, shift, loading)


@dataclass(frozen=True)
class Pixels:
    """A split in memory.

    Attributes:
        pixels: (N, 3, 32, 32) uint8.
        labels: (N,) int64.
        title: What to call it in a message.
    """

    pixels: Tensor
    labels: Tensor
    title: str

    @property
    def fingerprint(self) -> str:
        """Hash of pixels and labels."""
        return fingerprint_of(self.pixels, self.labels)

    def name(self, index: int) -> str:
        """The split and the image's number."""
        return f"{self.title} image {index}"

    def image(self, index: int) -> Image.Image:
        """Make an image of its pixels."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class CifarSource:
    """CIFAR before it takes its form from a model.

    Attributes:
        classes: 10 or 100.
        root: Folder of the files; None for the hub's.
        allow_pickle: Whether the python version may be unpickled.
        shift: Largest random shift in pixels, for a model without transforms.
        loading: How images become batches.
    """

    classes: int
    root: Path | None
    allow_pickle: bool
    shift: int
    loading: Loading

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Make the bundle: in the model's own transforms, or plain tensors in [-1, 1] where it has none.

        Raises:
            InputError: If the files are missing, damaged or pickled, the model reads no
                images, or more is asked for than there is.
        """
        if model.preprocessing is None:
            return self._plain(*self._splits())
        images = preprocessing_of(model, f"cifar{self.classes}")
        if images.input_size[1:] == (32, 32):
            images = replace(images, crop_pct=1.0)  # all of an image this small is needed
        train, test, notes = self._splits()
        task = Classification(self.classes, name=f"cifar{self.classes}")
        return image_bundle(f"cifar{self.classes}", task, train, test, images, self.loading, notes=notes)

    def _splits(self) -> tuple[Pixels, Pixels, list[str]]:
        if self.root is None:
            return (*_from_hub(self.classes), [])
        for folder in (self.root, self.root / BINARY[self.classes].folder):
            if (folder / BINARY[self.classes].test).is_file():
                return (*_from_files(folder, self.classes, binary=True), [])
        for folder in (self.root, self.root / PICKLED[self.classes].folder):
            if (folder / PICKLED[self.classes].test).is_file():
                return (*self._unpickled(folder), [f"unpickled from {folder}; only plain values and arrays let in"])
        wanted = BINARY[self.classes]
        raise InputError(
            f"data.root={self.root}: holds no CIFAR-{self.classes}; must be or hold {wanted.folder}, "
            f"with {wanted.train} and {wanted.test}"
        )

    def _unpickled(self, folder: Path) -> tuple[Pixels, Pixels]:
        if not self.allow_pickle:
            raise InputError(
                f"data.root={folder}: is the python version of CIFAR-{self.classes}, which would have to be unpickled; "
                f"allow that by data.allow_pickle=true, or give the binary version ({BINARY[self.classes].folder}), "
                "which needs none"
            )
        return _from_files(folder, self.classes, binary=False)

    def _plain(self, train: Pixels, test: Pixels, notes: list[str]) -> DataBundle:
        loading = self.loading
        splits = [{"inputs": part.pixels, "labels": part.labels} for part in (train, test)]
        drawn = calibration_sample(splits[0], loading.calibration_batches, loading.calibration_batch_size, loading.seed)
        calibration = [batch | {"inputs": scaled(batch["inputs"])} for batch in drawn]
        return DataBundle(
            name=f"cifar{self.classes}",
            domain="vision",
            task=Classification(self.classes, name=f"cifar{self.classes}"),
            calibration=calibration,
            train=TensorBatches(splits[0], loading.batch_size, loading.seed, partial(augmented, reach=self.shift)),
            train_samples=len(train.labels),
            validation=TensorBatches(splits[1], max(loading.batch_size, 256), augment=lambda pixels, _: scaled(pixels)),
            example={"inputs": scaled(test.pixels[:1])},
            fingerprints={
                "train": fingerprint_of(train.fingerprint, loading.batch_size, self.shift, loading.seed),
                "calibration": fingerprint_of(*(t for batch in calibration for t in batch.values())),
                "validation": fingerprint_of(test.fingerprint, loading.batch_size),
            },
            notes=notes,
        )


def scaled(pixels: Tensor) -> Tensor:
    """Map (B, 3, 32, 32) uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def augmented(pixels: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Scale, move each image by up to `reach` pixels along both axes and mirror half of them.

    Args:
        pixels: (B, 3, 32, 32) uint8.
        generator: Source of the changes.
        reach: Largest shift in pixels.
    """
    seed = int(torch.randint(2**62, (), generator=generator))  # one for all channels: they move together
    moved = [shifted(c, torch.Generator().manual_seed(seed), reach) for c in scaled(pixels).split(1, dim=1)]
    images = torch.cat(moved, dim=1)
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def _from_files(folder: Path, classes: int, binary: bool) -> tuple[Pixels, Pixels]:
    layout, read = (BINARY[classes], read_records) if binary else (PICKLED[classes], read_pickle)
    files = sorted(folder.glob(layout.train))
    if not files:
        raise InputError(f"data.root: {folder}: has no training files; must hold {layout.train}")
    pixels, labels = zip(*(read(file, classes) for file in files), strict=True)
    train = Pixels(torch.cat(pixels), torch.cat(labels), "training")
    return train, Pixels(*read(folder / layout.test, classes), "test")


def _from_hub(classes: int) -> tuple[Pixels, Pixels]:
    instead = f"data.root=<folder with {BINARY[classes].folder}>"
    splits = hub_splits(HUB_NAMES[classes], f"cifar{classes}", instead)

    def pixels(split: str) -> Pixels:
        images = [np.asarray(image.convert("RGB")) for image in splits[split]["img"]]
        labels = torch.tensor(splits[split][HUB_LABELS[classes]][:], dtype=torch.int64)
        return Pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels, split)

    return pixels("train"), pixels("test")
