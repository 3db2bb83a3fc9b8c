"""ADE20K as the scene parsing benchmark cuts it: 150 classes, from folders or from the hub.

Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017. In its label maps 0 is no class, 1 is `wall`.
"""

from functools import partial
from pathlib import Path, PurePath
from typing import Literal

from data.images import Loading
from data.label_maps import label_table
from data.pairs import PairFiles, Pairs, listed, paired, refuse_other_layout
from data.segmentation import SegmentationSource, hub_pairs
from evals.palette import spread_colours
from utils.rules import Count, ExistingPath, Seed, Whole, checked

ARCHIVE = "ADEChallengeData2016"
NAMES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk",
    "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa",
    "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp",
    "bathtub", "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand",
    "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table",
    "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower",
    "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
    "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight",
    "booth", "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator",
    "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer",
    "plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven",
    "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher",
    "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier",
    "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
)  # fmt: skip
TABLE = label_table({value: value - 1 for value in range(1, len(NAMES) + 1)}, ignored=(0,))


@checked
def ade20k(
    *,
    classes: Literal[150] = 150,
    root: ExistingPath | None = None,
    hub_name: str = "zhoubolei/scene_parse_150",
    hub_config: str | None = "scene_parsing",
    hub_revision: str | None = "refs/convert/parquet",
    batch_size: Count = 8,
    calibration_batches: Whole = 4,
    calibration_batch_size: Count = 8,
    train_samples: Count | None = None,
    validation_samples: Count | None = None,
    workers: Whole | None = None,
    seed: Seed = 0,
) -> SegmentationSource:
    """Describe ADE20K; it is read once the model, which brings the transforms, is there.

    Args:
        classes: Always 150; there for the model's configuration to refer to.
        root: Folder with `images/` and `annotations/`, each with `training/` and `validation/`, or the one that
            holds it as `ADEChallengeData2016`; None takes the hub's.
        hub_name: Name of the hub's, or a folder that the datasets library reads.
        hub_config: Which of its configurations; None for its only one.
        hub_revision: Which of its revisions; None for the newest.
        batch_size: Images per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from training.
        calibration_batch_size: Images in each; part of the definition of a score.
        train_samples: Train and calibrate on that many images, drawn by the seed; None on all.
        validation_samples: Validate on that many images, drawn by the seed; None on all.
        workers: Processes that decode; None means up to 4, 0 decodes in this one.
        seed: Seeds the order and augmentation of training and all that is drawn.
    """
    instead = "data.root=<folder with images/ and annotations/>"
    hub = partial(hub_pairs, hub_name, hub_config, hub_revision, TABLE, "ade20k", instead)
    splits = hub if root is None else partial(ade20k_files, Path(root))
    loading = Loading(batch_size, calibration_batches, calibration_batch_size, workers, seed)
    colours = spread_colours(len(NAMES))
    return SegmentationSource("ade20k", NAMES, colours, splits, loading, train_samples, validation_samples)


def ade20k_files(root: Path) -> tuple[Pairs, Pairs]:
    """Pairs of the training and the validation split.

    Raises:
        InputError: If the folders are others, one is empty, or a file has no partner.
    """
    inside = root / ARCHIVE if (root / ARCHIVE).is_dir() else root
    return _split(inside, "training"), _split(inside, "validation")


def _split(root: Path, split: str) -> PairFiles:
    folders = [f"{what}/{part}" for what in ("images", "annotations") for part in ("training", "validation")]
    refuse_other_layout(root, folders)
    images, labels = f"images/{split}", f"annotations/{split}"
    pairs = paired(
        _keyed(root, images, (".jpg", ".jpeg", ".png")), _keyed(root, labels, (".png",)), f"{root}: {images}, {labels}"
    )
    files = [(image, label_map, TABLE) for image, label_map in pairs]
    return PairFiles(root, files, f"ade20k {split}", whole=split == "validation")


def _keyed(root: Path, folder: str, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """Files of a split with their names without the ending."""
    return [(PurePath(path).stem, path) for path in listed(root, folder, endings)]
