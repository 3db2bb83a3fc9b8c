"""Opening images that anybody may have made: known formats, and no more pixels than a photograph has.

A file of some kilobytes can stand for billions of pixels, and some of PIL's formats start other programs.
"""

from pathlib import Path
from typing import IO

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
BOMB = "DecompressionBombError"


def most_pixels() -> int:
    """PIL's own limit, at which it would only warn."""
    return Image.MAX_IMAGE_PIXELS or 89_478_485


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        DecompressionBombError: If it has more pixels than PIL takes without a warning.
        OSError: If it is none of the known formats, or damaged.
    """
    try:
        image = Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Image.DecompressionBombError(f"{error}; must have at most {most_pixels():,} pixels") from error
    if image.width * image.height > most_pixels():
        raise Image.DecompressionBombError(
            f"has {image.width}x{image.height} pixels; must have at most {most_pixels():,}"
        )
    return image
