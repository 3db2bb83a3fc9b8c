"""A segmentation data set: images with a class for every pixel, as the bundle that a model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import data.label_maps
import data.pairs
from data.base import Batch, DataBundle, fingerprint_of
from data.hub import hub_splits
from data.images import AUGMENTATION, Loading, generator_of, preprocessing_of, workers_of
from data.label_maps import Table
from data.pair_batches import Form, PairBatches, pair_batches
from data.pairs import PairRows, Pairs, labelled_pixels
from data.segmentation_task import Segmentation
from utils.code import code_hash
from utils.errors import InputError
from utils.storage import Artifact, Scratch, Store, folder_name

if TYPE_CHECKING:
    from models.base import PrunableModel

MASK_STRIDE = 4
LABEL_COLUMNS = ("annotation", "label", "labels", "semantic_segmentation", "segmentation", "mask")
SPLITS = (("train", "training"), ("validation", "val"))
NAMED = 5  # classes that a note names before it counts


@dataclass(frozen=True)
class SegmentationSource:
    """A segmentation data set before it takes its form from a model.

    Attributes:
        name: Short name for folders and reports.
        names: Of the classes.
        colours: Of the classes, for pictures.
        splits: Lists the training and the validation pairs.
        loading: How images become batches.
        train_samples: Pairs to train and calibrate on, drawn by the seed; None for all.
        validation_samples: Pairs to validate on, likewise.
    """

    name: str
    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]]
    splits: Callable[[], tuple[Pairs, Pairs]]
    loading: Loading
    train_samples: int | None = None
    validation_samples: int | None = None

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Make the bundle in the model's own form, after a look at every pair.

        Raises:
            InputError: If the model has no transforms, a pair can't be used, or more is asked for than there is.
        """
        return self.prepare_in(model, None)

    def prepare_in(self, model: "PrunableModel", store: Store | None) -> DataBundle:
        """The same; pairs that storage knows to be sound are not looked at again."""
        form = self._form(model)
        train, validation = self.splits()
        train, _ = self._drawn(train, self.train_samples, "train")
        validation, notes = self._drawn(validation, self.validation_samples, "validation")
        self._refuse_calibration(len(train))
        empty = self._empty(self._pixels(validation, store))
        self._pixels(train, store)
        size = "x".join(map(str, form.images.input_size[1:]))
        scaled = f"images are scaled whole to {size} pixels (height x width), whatever their shape; nothing is cropped"
        return self._bundle(form, train, validation, [scaled, *notes, *empty])

    def _form(self, model: "PrunableModel") -> Form:
        images = preprocessing_of(model, self.name)
        height, width = images.input_size[1:]
        if min(height, width) < MASK_STRIDE:
            rule = f"must take at least {MASK_STRIDE}x{MASK_STRIDE} pixels"
            raise InputError(f"data={self.name}: model={model.name} takes {height}x{width}; it {rule}")
        return Form(images, (height // MASK_STRIDE, width // MASK_STRIDE))

    def _drawn(self, pairs: Pairs, wanted: int | None, part: str) -> tuple[Pairs, list[str]]:
        count = len(pairs)
        if wanted is None or wanted == count:
            return pairs, []
        if wanted > count:
            raise InputError(f"data.{part}_samples={wanted}: must be at most the {count} pairs of {pairs.title}")
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(self.loading.seed))[:wanted]
        note = f"validated on {wanted} of {count} images, drawn by the seed"
        return pairs.some(rows.sort().values.tolist()), [note]

    def _refuse_calibration(self, count: int) -> None:
        batches, size = self.loading.calibration_batches, self.loading.calibration_batch_size
        if not 0 < batches * size <= count:
            raise InputError(
                f"data.calibration_batches={batches}, data.calibration_batch_size={size}: {batches * size} samples; "
                f"must be between 1 and the {count} training images"
            )

    def _pixels(self, pairs: Pairs, store: Store | None) -> list[int]:
        """Labelled pixels of each class; every pair is decoded for it, unless storage remembers."""

        def looked(scratch: Scratch | None = None) -> Artifact:
            found = labelled_pixels(pairs, len(self.names), max(1, workers_of(self.loading.workers)))
            return Artifact({"pixels": torch.from_numpy(found)}, {"split": pairs.title, "pairs": len(pairs)})

        if store is None:
            return looked().tensors["pixels"].tolist()
        key = {"pairs": pairs.fingerprint, "classes": len(self.names), "code": code_hash(data.pairs, data.label_maps)}
        kept = store.fetch(f"vision/{folder_name(self.name)}", "labels", key, looked)
        return kept.artifact.tensors["pixels"].tolist()

    def _empty(self, pixels: Sequence[int]) -> list[str]:
        """A note on classes that no validation label has."""
        absent = [name for name, count in zip(self.names, pixels, strict=True) if not count]
        if not absent:
            return []
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        return [
            f"{len(absent)} of the {len(self.names)} classes are in no validation label: {', '.join(absent[:NAMED])}"
            f"{more}; a class that no prediction has either is left out of the mean IoU"
        ]

    def _bundle(self, form: Form, train: Pairs, validation: Pairs, notes: list[str]) -> DataBundle:
        loading, settings = self.loading, (repr(form), self.loading.batch_size)
        calibration = self._calibration(train, form)
        whole = PairBatches(validation, form, loading.batch_size, loading.workers)
        alone = PairBatches(validation.some([0]), form, 1, 0)
        return DataBundle(
            name=self.name,
            domain="vision",
            task=Segmentation(len(self.names), form.mask_size, names=self.names, colours=self.colours, name=self.name),
            calibration=calibration,
            train=PairBatches(train, form, loading.batch_size, loading.workers, loading.seed),
            train_samples=len(train),
            validation=whole,
            example={"inputs": next(iter(alone))["inputs"]},
            fingerprints={
                "train": fingerprint_of(train.fingerprint, *settings, repr(AUGMENTATION["scale"]), loading.seed),
                "calibration": fingerprint_of(
                    *(tensor for batch in calibration for tensor in batch.values()), loading.calibration_batch_size
                ),
                "validation": fingerprint_of(validation.fingerprint, *settings),
            },
            notes=notes,
        )

    def _calibration(self, train: Pairs, form: Form) -> list[Batch]:
        """Batches without repeats, the same for the same seed, with label maps at the masks' size."""
        size = self.loading.calibration_batch_size
        order = torch.randperm(len(train), generator=generator_of(f"{self.loading.seed}"))
        chosen = order[: self.loading.calibration_batches * size]
        return list(pair_batches(train, form, chosen, size, self.loading.workers, small=True))


def hub_pairs(
    source: str, config: str | None, revision: str | None, table: Table, data: str, instead: str
) -> tuple[PairRows, PairRows]:
    """Training and validation pairs of a hub data set with a column of images and one of label maps.

    Args:
        source: Name at the hub, or a folder in a format that the datasets library reads.
        config: Which of its configurations; None for its only one.
        revision: Which of its revisions; None for the newest.
        table: What the values of label maps mean.
        data: What `data=` was set to, for messages.
        instead: How to provide it without the hub.

    Raises:
        InputError: If it can't be had, or has no such splits or columns, or an empty split.
    """
    splits = hub_splits(source, data, instead, config, revision)
    return _rows(splits, SPLITS[0], table, source), _rows(splits, SPLITS[1], table, source)


def _rows(splits: Any, names: Sequence[str], table: Table, source: str) -> PairRows:
    from datasets import Image as EncodedImage

    held: dict[str, Any] = dict(splits)
    name = next((name for name in names if name in held), None)
    if name is None or not len(held[name]):
        found = ", ".join(f"{key} ({len(rows)})" for key, rows in held.items()) or "none"
        raise InputError(f"data.hub_name={source}: its splits are {found}; needs {names[0]} with at least one row")
    rows = held[name]
    label = next((column for column in LABEL_COLUMNS if column in rows.column_names), None)
    if label is None or "image" not in rows.column_names:
        needed = f"image and one of {', '.join(LABEL_COLUMNS)}"
        raise InputError(f"data.hub_name={source}: has the columns {', '.join(rows.column_names)}; needs {needed}")
    for column in ("image", label):
        # decoded by us, so that what can't be read is named
        rows = rows.cast_column(column, EncodedImage(decode=False))
    return PairRows(rows, ("image", label), table, f"{source} {name}")
