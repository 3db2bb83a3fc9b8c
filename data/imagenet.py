"""ImageNet-1k (ILSVRC2012): photos of 1,000 classes, from folders by WordNet id or from the hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from timm.data import ImageNetInfo  # type: ignore[attr-defined]
from torch import Tensor

from data.base import Classification, DataBundle, fingerprint_of
from data.hub import hub_splits
from data.image_files import open_image
from data.images import ImageItems, Loading, image_bundle, preprocessing_of
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Seed, Whole, checked

if TYPE_CHECKING:
    from models.base import PrunableModel

HUB_NAME = "ILSVRC/imagenet-1k"
EXTENSIONS = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
VALIDATION_FOLDERS = ("val", "validation")


@checked
def imagenet(
    *,
    classes: Literal[1000] = 1000,
    root: ExistingPath | None = None,
    batch_size: Count = 64,
    calibration_batches: Whole = 16,
    calibration_batch_size: Count = 32,
    validation_samples: Count | None = None,
    workers: Whole | None = None,
    seed: Seed = 0,
) -> "ImageNetSource":
    """Describe ImageNet; it is read once the model, which brings the transforms, is there.

    Args:
        classes: Always 1000; there for the model's configuration to refer to.
        root: Folder with `train/<wnid>/` and `val/<wnid>/`; None takes the hub's.
        batch_size: Images per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Images in each; part of the definition of a score.
        validation_samples: Validate on that many images, drawn by the seed; None on all.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        seed: Seeds the order and augmentation of training and all that is drawn.
    """
    loading = Loading(batch_size, calibration_batches, calibration_batch_size, workers, seed)
    return ImageNetSource(Path(root) if root else None, validation_samples, loading)


@dataclass(frozen=True)
class ImageNetSource:
    """ImageNet before it takes its form from a model.

    Attributes:
        root: Folder with `train/` and `val/`; None for the hub's.
        validation_samples: Images to validate on; None for all.
        loading: How images become batches.
    """

    root: Path | None
    validation_samples: int | None
    loading: Loading

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Make the bundle in the model's own transforms.

        Raises:
            InputError: If the model has none, a folder is no class, there is nothing to
                validate on, more is asked for than there is, or too many images are broken.
        """
        images = preprocessing_of(model, "imagenet")
        train, everything = _from_hub() if self.root is None else _from_folder(self.root)
        validation, notes = self._validation(everything)
        if len(train.labels) == 0:
            notes.append(
                f"{self.root} has no train/: the calibration images were drawn from validation images, on which the "
                "pruned model is then judged; its scores have seen some of them"
            )
        task = Classification(1000, name="imagenet")
        return image_bundle("imagenet", task, train, validation, images, self.loading, unused=everything, notes=notes)

    def _validation(self, everything: ImageItems) -> tuple[ImageItems, list[str]]:
        wanted, count = self.validation_samples, len(everything.labels)
        if wanted is None or wanted == count:
            return everything, []
        if wanted > count:
            raise InputError(f"data.validation_samples={wanted}: must be at most the {count} validation images")
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(self.loading.seed))[:wanted]
        return Part(everything, rows.sort().values), [f"validated on {wanted} of {count} images, drawn by the seed"]


@dataclass(frozen=True)
class ClassFolders:
    """Images in one folder a class.

    Attributes:
        root: Folder of the class folders.
        paths: Path of each image, relative to it.
        sizes: Size of each file in bytes.
        labels: Class of each image, (N,) int64.
    """

    root: Path
    paths: Sequence[str]
    sizes: Sequence[int]
    labels: Tensor

    @property
    def fingerprint(self) -> str:
        """Hash of relative paths, file sizes and labels."""
        files = (f"{path}:{size}" for path, size in zip(self.paths, self.sizes, strict=True))
        return fingerprint_of(*files, self.labels)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.paths[index])

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        return open_image(self.root / self.paths[index])


@dataclass(frozen=True)
class HubRows:
    """Rows of a hub data set whose `image` column holds encoded images.

    Attributes:
        rows: The split.
        labels: Class of each row, (N,) int64.
        title: What to call the split in a message.
    """

    rows: Any
    labels: Tensor
    title: str

    @property
    def fingerprint(self) -> str:
        """The library's own hash of the split, and the labels."""
        return fingerprint_of(str(self.rows._fingerprint), self.labels)

    def name(self, index: int) -> str:
        """The split and the row's number."""
        return f"{self.title} row {index}"

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        stored = self.rows[index]["image"]
        return open_image(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))


@dataclass(frozen=True)
class Part:
    """Some images of a split.

    Attributes:
        whole: The split.
        rows: Which of its images, (n,) int64.
    """

    whole: ImageItems
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """The class of each image, (n,) int64."""
        return self.whole.labels[self.rows]

    @property
    def fingerprint(self) -> str:
        """Hash of the split and the choice."""
        return fingerprint_of(self.whole.fingerprint, self.rows)

    def name(self, index: int) -> str:
        """The name it has in the split."""
        return self.whole.name(int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        return self.whole.image(int(self.rows[index]))


def class_folders(root: Path) -> ClassFolders:
    """List the images of a split.

    Args:
        root: Folder whose folders are named by WordNet ids; it may hold only some of the 1,000.

    Raises:
        InputError: If a folder has another name, or there is no image.
    """
    index = {wnid: position for position, wnid in enumerate(ImageNetInfo().label_names())}
    paths, sizes, labels = [], [], []
    for folder in _listed(root):
        if not _is_folder(folder):
            continue
        if folder.name not in index:
            raise InputError(
                f"data.root: {folder.path}: must be named by one of ImageNet's 1,000 WordNet ids, such as n01440764"
            )
        for file in _listed(Path(folder.path)):
            if Path(file.name).suffix.lower() in EXTENSIONS and not _is_folder(file):
                paths.append(f"{folder.name}/{file.name}")
                # a link that leads nowhere stays in the list, to be reported as broken
                sizes.append(file.stat().st_size if _is_file(file) else 0)
                labels.append(index[folder.name])
    if not paths:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise InputError(f"data.root: {root}: holds no images; must hold <WordNet id>/*, of the kinds {kinds}")
    return ClassFolders(root, paths, sizes, torch.tensor(labels, dtype=torch.int64))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads back to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder by name, hidden entries left out."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _from_folder(root: Path) -> tuple[ImageItems, ImageItems]:
    found = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if not found:
        raise InputError(f"data.root={root}: must hold val/<WordNet id>/* (or validation/), and train/ likewise")
    no_train = ClassFolders(root / "train", (), (), torch.empty(0, dtype=torch.int64))
    return class_folders(root / "train") if (root / "train").is_dir() else no_train, class_folders(found[0])


def _from_hub() -> tuple[ImageItems, ImageItems]:
    splits = hub_splits(HUB_NAME, "imagenet", "data.root=<folder with train/ and val/ by WordNet id>")
    from datasets import Image as EncodedImage

    def rows(split: str) -> HubRows:
        # decoded by us, so that a broken image is skipped like any other
        encoded = splits[split].cast_column("image", EncodedImage(decode=False))
        return HubRows(encoded, torch.tensor(splits[split]["label"][:], dtype=torch.int64), f"{HUB_NAME} {split}")

    return rows("train"), rows("validation")
