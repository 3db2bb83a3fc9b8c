"""Labelled images, decoded when asked for and transformed as the model wants them.

Shapes: B samples, C channels, H and W the model's input size in pixels.
"""

import copy
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.base import Batch, DataBundle, Task, divided_rows, fingerprint_of
from data.image_files import BOMB
from models.preprocessing import ImagePreprocessing
from utils.errors import InputError
from utils.progress import progress_bar

if TYPE_CHECKING:
    from models.base import PrunableModel

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Tensor]
Failure = tuple[str, str]  # name of the image, reason
MOST_BROKEN = 0.01
# weaker than for training from scratch (scale 0.08, jitter 0.4): recovery is a matter of few epochs
AUGMENTATION: dict[str, Any] = {"scale": (0.35, 1.0), "color_jitter": 0.2}


class ImageItems(Protocol):
    """The images of one split, not decoded yet."""

    @property
    def labels(self) -> Tensor:
        """The class of each image, (N,) int64."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image or a label does."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in a message: its path where it has one."""
        ...

    def image(self, index: int) -> Image.Image:
        """Open an image; raises whatever its decoder raises."""
        ...


@dataclass(frozen=True)
class Loading:
    """How images become batches; the arguments that all image sources share.

    Attributes:
        batch_size: Images per training and validation batch.
        calibration_batches: Batches that scores are computed on.
        calibration_batch_size: Images in each.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        seed: Seeds order, augmentation and the calibration sample.
    """

    batch_size: int
    calibration_batches: int
    calibration_batch_size: int
    workers: int | None
    seed: int


class Broken:
    """The images of one split that can't be read: each is reported once, too many are an error."""

    def __init__(self, split: str, total: int, notes: list[str] | None = None) -> None:
        self.split, self.total = split, total
        self.reasons: dict[str, str] = {}
        self.notes = [] if notes is None else notes
        self.said = ""

    def add(self, failures: Iterable[Failure]) -> None:
        """Report images that have not been reported yet.

        Raises:
            InputError: If more than 1% of the split is broken.
        """
        for name, reason in failures:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("%s: can't be read and is skipped: %s", name, reason)
                self._note()
            if reason.startswith(BOMB):
                raise InputError(f"{name}: {reason.removeprefix(f'{BOMB}: ')}")
            if len(self.reasons) > MOST_BROKEN * self.total:
                first, why = next(iter(self.reasons.items()))
                raise InputError(
                    f"{first}: {why}; at least {len(self.reasons)} of the {self.total} {self.split} images can't be "
                    f"read, must be at most {MOST_BROKEN:.0%}"
                )

    def _note(self) -> None:
        """Keep one line on it among the notes of the data."""
        if self.said in self.notes:
            self.notes.remove(self.said)
        found = f"of the {self.total} {self.split} images can't be read and are skipped"
        self.said = f"{len(self.reasons)} {found}; the first is {next(iter(self.reasons))}"
        self.notes.append(self.said)


class ImageBatches:
    """Batches of decoded images; shuffled and augmented anew each epoch if a seed is given.

    Epoch k of one seed is always the same, whatever was drawn before and however many
    processes decode. Images that can't be read are left out of their batch.
    """

    def __init__(
        self,
        items: ImageItems,
        transform: Transform,
        batch_size: int,
        broken: Broken,
        workers: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.items, self.transform, self.batch_size = items, transform, batch_size
        self.broken, self.workers, self.shuffle_seed = broken, workers, shuffle_seed
        self.epoch = 1

    @property
    def skipped(self) -> int:
        """Images of the split that were found broken so far."""
        return len(self.broken.reasons)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.items.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield {"inputs": (B, C, H, W) float32, "labels": (B,) int64}."""
        count, key = len(self.items.labels), f"{self.shuffle_seed}/{self.epoch}"
        order = torch.arange(count)
        if self.shuffle_seed is not None:
            order = torch.randperm(count, generator=generator_of(key))
        for batch, failures in _decoded(self.items, self.transform, order, self.batch_size, self.workers, key):
            self.broken.add(failures)
            if batch is not None:
                yield batch

    def divided(self, share: float, seed: int) -> tuple["ImageBatches", "ImageBatches"]:
        """Batches of all images but a share, and batches of that share."""
        rest, held = divided_rows(len(self.items.labels), share, seed)
        return self._of(rest), self._of(held)

    def _of(self, rows: Tensor) -> "ImageBatches":
        twin = copy.copy(self)
        twin.items = SomeItems(self.items, rows)
        return twin


@dataclass(frozen=True)
class SomeItems:
    """Some of the images of a split.

    Attributes:
        items: All of them.
        rows: Which, (N,).
    """

    items: ImageItems
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """The class of each image, (N,) int64."""
        return self.items.labels[self.rows]

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image, a label or the choice does."""
        return fingerprint_of(self.items.fingerprint, self.rows)

    def name(self, index: int) -> str:
        """What the split calls it."""
        return self.items.name(int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        """Open an image."""
        return self.items.image(int(self.rows[index]))


def transform_of(images: ImagePreprocessing, training: bool = False) -> Transform:
    """Build timm's transform: the model's own for evaluation, with moderate augmentation for training."""
    # takes a second, and much that knows of images never loads one
    from timm.data import create_transform  # type: ignore[attr-defined]

    return create_transform(**asdict(images), is_training=training, **AUGMENTATION)  # type: ignore[return-value]


def preprocessing_of(model: "PrunableModel", data: str) -> ImagePreprocessing:
    """Return how the model wants its images.

    Raises:
        InputError: If it says nothing about it, or reads no colour images.
    """
    images = model.preprocessing
    if not isinstance(images, ImagePreprocessing):
        raise InputError(f"data={data} needs a vision model with its own transforms; model={model.name} has none")
    if images.input_size[0] != 3:
        raise InputError(f"data={data} has 3 channels; model={model.name} takes {images.input_size[0]}")
    return images


def draw_calibration(items: ImageItems, transform: Transform, broken: Broken, loading: Loading) -> list[Batch]:
    """Draw batches without repeats, the same for the same seed; an unreadable image is replaced by another.

    Raises:
        InputError: If that asks for no image or for more than there are.
    """
    count, size = len(items.labels), loading.calibration_batch_size
    wanted = loading.calibration_batches * size
    asked = f"data.calibration_batches={loading.calibration_batches}, data.calibration_batch_size={size}"
    if not 0 < wanted <= count:
        raise InputError(f"{asked}: {wanted} samples; must be between 1 and the {count} {broken.split} images")
    order = torch.randperm(count, generator=generator_of(f"{loading.seed}"))
    drawn = _decoded(items, transform, order[:wanted], size, loading.workers)
    spare = _decoded(items, transform, order[wanted:], 1, 0)
    parts: list[Batch] = []
    with progress_bar("calibration images", loading.calibration_batches) as advance:
        for batch, failures in chain(drawn, spare):
            broken.add(failures)
            parts += [batch] if batch is not None else []
            advance("")
            if sum(len(part["labels"]) for part in parts) == wanted:
                whole = {name: torch.cat([part[name] for part in parts]).split(size) for name in ("inputs", "labels")}
                return [dict(zip(whole, rows, strict=True)) for rows in zip(*whole.values(), strict=True)]
    raise InputError(f"{asked}: {wanted} samples; must be at most the {count - len(broken.reasons)} readable images")


def image_bundle(
    name: str,
    task: Task,
    train: ImageItems,
    validation: ImageItems,
    images: ImagePreprocessing,
    loading: Loading,
    unused: ImageItems | None = None,
    notes: Iterable[str] = (),
) -> DataBundle:
    """Assemble the bundle of a set of images.

    Args:
        name: Short name for folders and reports.
        task: How outputs are scored.
        train: Training images; may be none.
        validation: Validation images.
        images: How the model wants them.
        loading: How they become batches.
        unused: What calibration is drawn from where there is nothing to train on; the validation images by default.
        notes: What a reader should know of how it was made.

    Raises:
        InputError: If the calibration sample asks for too much, or too many images are broken.
    """
    plain, seed, size = transform_of(images), loading.seed, loading.batch_size
    said = [*notes]  # grows as unreadable images are met
    broken = Broken("validation", len(validation.labels), said)
    broken_train = Broken("training", len(train.labels), said)
    pool, reports = (train, broken_train) if len(train.labels) else (validation, broken)
    if pool is validation and unused is not None:
        pool, reports = unused, Broken("validation", len(unused.labels), said)
    calibration = draw_calibration(pool, plain, reports, loading)
    batches = ImageBatches(validation, plain, size, broken, loading.workers)
    return DataBundle(
        name=name,
        domain="vision",
        task=task,
        calibration=calibration,
        train=ImageBatches(train, transform_of(images, True), size, broken_train, loading.workers, seed),
        train_samples=len(train.labels),
        validation=batches,
        example={"inputs": next(iter(ImageBatches(validation, plain, 1, broken, 0)))["inputs"]},
        fingerprints={
            "train": fingerprint_of(train.fingerprint, repr(images), repr(AUGMENTATION), size, seed),
            "calibration": fingerprint_of(
                *(t for batch in calibration for t in batch.values()), loading.calibration_batch_size
            ),
            "validation": fingerprint_of(validation.fingerprint, repr(images), size),
        },
        notes=said,
    )


class _Samples(Dataset):
    """One pass over images: (C, H, W) and label, or why there is none."""

    def __init__(self, items: ImageItems, transform: Transform, key: str) -> None:
        self.items, self.transform, self.key, self.labels = items, transform, key, items.labels

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Failure:
        try:
            image = self.items.image(index).convert("RGB")
        except Exception as error:  # decoders raise nearly anything on a damaged file
            return self.items.name(index), f"{type(error).__name__}: {error}"
        with _seeded(f"{self.key}/{index}"):
            return self.transform(image), int(self.labels[index])


def _decoded(
    items: ImageItems, transform: Transform, order: Tensor, batch_size: int, workers: int | None, key: str = ""
) -> Iterator[tuple[Batch | None, list[Failure]]]:
    """Decode the images in this order; each batch comes with what could not be read of it."""
    return one_pass(_Samples(items, transform, key), order, batch_size, workers, _collated)


def one_pass(
    samples: Dataset, order: Tensor, batch_size: int, workers: int | None, collated: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """Go once over samples in this order, decoded by other processes where there are workers.

    Args:
        samples: By their numbers.
        order: Numbers, (n,) int64.
        batch_size: Samples in a batch.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        collated: Makes a batch of samples.
    """
    return iter(
        DataLoader(
            samples,
            batch_size=batch_size,
            sampler=order.tolist(),
            num_workers=min(workers_of(workers), -(-len(order) // batch_size)),
            collate_fn=collated,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
    )


def workers_of(workers: int | None) -> int:
    """Processes that decode where the configuration leaves it open: one a core, up to 4."""
    if workers is not None:
        return workers
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _collated(samples: list[tuple[Tensor, int] | Failure]) -> tuple[Batch | None, list[Failure]]:
    good = [(image, label) for image, label in samples if isinstance(image, Tensor)]
    failures = [(name, str(reason)) for name, reason in samples if isinstance(name, str)]
    if not good:
        return None, failures
    inputs, labels = zip(*good, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.tensor(labels, dtype=torch.int64)}, failures


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def generator_of(key: str) -> torch.Generator:
    """A generator that this key alone seeds."""
    return torch.Generator().manual_seed(_number(key))


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Let transforms draw what belongs to this key, whichever process they run in, and leave no trace.

    The CPU's generators alone: a forked worker must not touch CUDA.
    """
    python, tensors = random.getstate(), torch.get_rng_state()
    random.seed(_number(key))
    torch.default_generator.manual_seed(_number(key))
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(tensors)
