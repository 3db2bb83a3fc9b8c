"""Cityscapes: streets of 50 cities in 19 classes, from the archives' folders or from the hub.

Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016. Label maps hold the
data set's own ids, `*_labelIds.png`, or ids of the 19 classes that are trained, `*_labelTrainIds.png`.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from data.images import Loading
from data.label_maps import Table, label_table
from data.pairs import PairFiles, Pairs, listed, paired, refuse_other_layout
from data.segmentation import SegmentationSource, hub_pairs
from utils.rules import Count, ExistingPath, Seed, Whole, checked

# id in the data set, name, colour; in the order of the training ids
CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
NAMES, COLOURS = tuple(name for _, name, _ in CLASSES), tuple(colour for *_, colour in CLASSES)
_OF_ID = {value: label for label, (value, _, _) in enumerate(CLASSES)}
IDS = label_table(_OF_ID, ignored=tuple(set(range(34)) - _OF_ID.keys()))
TRAIN_IDS = label_table({label: label for label in range(len(CLASSES))}, ignored=())
IMAGE = "_leftImg8bit.png"
LABELS = {"_gtFine_labelIds.png": IDS, "_gtFine_labelTrainIds.png": TRAIN_IDS}


@checked
def cityscapes(
    *,
    classes: Literal[19] = 19,
    root: ExistingPath | None = None,
    hub_name: str = "Chris1/cityscapes",
    hub_config: str | None = None,
    hub_revision: str | None = None,
    hub_labels: Literal["ids", "train_ids"] = "ids",
    batch_size: Count = 2,
    calibration_batches: Whole = 4,
    calibration_batch_size: Count = 2,
    train_samples: Count | None = None,
    validation_samples: Count | None = None,
    workers: Whole | None = None,
    seed: Seed = 0,
) -> SegmentationSource:
    """Describe Cityscapes; it is read once the model, which brings the transforms, is there.

    Args:
        classes: Always 19; there for the model's configuration to refer to.
        root: Folder with `leftImg8bit/` and `gtFine/`, each with `train/<city>/` and `val/<city>/`; None takes the
            hub's.
        hub_name: Name of the hub's, or a folder that the datasets library reads. The owners' licence lets nobody
            pass the data on, so that none there is theirs.
        hub_config: Which of its configurations; None for its only one.
        hub_revision: Which of its revisions; None for the newest.
        hub_labels: Whether its label maps hold the data set's own ids or those of the 19 classes.
        batch_size: Images per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Images in each; part of the definition of a score.
        train_samples: Train and calibrate on that many images, drawn by the seed; None on all.
        validation_samples: Validate on that many images, drawn by the seed; None on all.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        seed: Seeds the order and augmentation of training and all that is drawn.
    """
    table = IDS if hub_labels == "ids" else TRAIN_IDS
    instead = "data.root=<folder with leftImg8bit/ and gtFine/>"
    hub = partial(hub_pairs, hub_name, hub_config, hub_revision, table, "cityscapes", instead)
    splits = hub if root is None else partial(cityscapes_files, Path(root))
    loading = Loading(batch_size, calibration_batches, calibration_batch_size, workers, seed)
    return SegmentationSource("cityscapes", NAMES, COLOURS, splits, loading, train_samples, validation_samples)


def cityscapes_files(root: Path) -> tuple[Pairs, Pairs]:
    """Pairs of the training and the validation split; of a label map in both forms the data set's own ids are read.

    Raises:
        InputError: If the folders are others, one is empty, or a file has no partner.
    """
    return _split(root, "train"), _split(root, "val")


def _split(root: Path, split: str) -> PairFiles:
    refuse_other_layout(root, [f"{what}/{part}" for what in ("leftImg8bit", "gtFine") for part in ("train", "val")])
    images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
    found: dict[str, tuple[str, Table]] = {}
    for ending, table in reversed(LABELS.items()):
        found |= {key: (path, table) for key, path in _keyed(root, labels, ending)}
    pairs = paired(
        _keyed(root, images, IMAGE), [(key, path) for key, (path, _) in found.items()], f"{root}: {images}, {labels}"
    )
    tables = {path: table for path, table in found.values()}
    files = [(image, labels, tables[labels]) for image, labels in pairs]
    return PairFiles(root, files, f"cityscapes {split}", whole=split == "val")


def _keyed(root: Path, folder: str, ending: str) -> list[tuple[str, str]]:
    """Files of a split with their city and name without the ending."""
    paths = listed(root, folder, (ending.lower(),))
    return [(path[len(folder) + 1 : -len(ending)], path) for path in paths]
