"""Label maps: images whose values are classes, and the tables that turn a data set's values into ours."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from utils.errors import InputError

IGNORED, NO_LABEL = 255, -1
# a grey PNG of 2 or 4 bits reaches us stretched to 0..255: by these factors
STRETCHED = {"L;2": 85, "L;4": 17}
MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")

Table = np.ndarray  # (256,) int16: the class of each value, IGNORED, or NO_LABEL where there must be none


def label_table(classes: Mapping[int, int], ignored: tuple[int, ...]) -> Table:
    """Make a table of 256 values.

    Args:
        classes: The class of each value that has one.
        ignored: Values that stand for no class; 255 always does.
    """
    table = np.full(256, NO_LABEL, dtype=np.int16)
    table[[*ignored, IGNORED]] = IGNORED
    for value, label in classes.items():
        table[value] = label
    return table


def read_label_map(image: Image.Image, table: Table, name: str) -> np.ndarray:
    """Decode a label map and translate it.

    Grey images of 1 to 16 bits and palette images (by index, the colours don't matter) hold labels; colours,
    an alpha channel and lossy formats do not.

    Args:
        image: As the file was opened.
        table: What its values mean.
        name: What to call it in a message.

    Returns:
        Classes, (H, W) uint8, 255 where there is none.

    Raises:
        InputError: If it holds no labels, or a value that the table does not know.
    """
    if image.mode not in MODES or image.format in ("JPEG", "MPO"):
        kind = f"a {image.format or 'picture'} of mode {image.mode}"
        raise InputError(f"{name}: is {kind}; a label map must be a grey or palette PNG, one number a pixel")
    factor = stretched_by(image)  # asked before: decoding forgets it
    values = np.asarray(image).astype(np.int64) // factor
    known = (values >= 0) & (values < len(table))
    labels = np.where(known, table[np.where(known, values, 0)], NO_LABEL)
    if (wrong := labels == NO_LABEL).any():
        row, column = np.argwhere(wrong)[0]
        where = f"{name}: pixel (row {row}, column {column}) has the label {values[row, column]}"
        raise InputError(f"{where}, one of {int(wrong.sum())} wrong ones; labels must be {_allowed(table)}")
    return labels.astype(np.uint8)


def stretched_by(image: Image.Image) -> int:
    """What the values of an image will have been multiplied by once it is decoded."""
    tiles = getattr(image, "tile", ())
    return STRETCHED.get(str(tiles[0][3]), 1) if tiles else 1


def _allowed(table: Table) -> str:
    """The values that a table knows, as ranges."""
    known = np.flatnonzero(table != NO_LABEL)
    runs = np.split(known, np.flatnonzero(np.diff(known) != 1) + 1)
    return " or ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
