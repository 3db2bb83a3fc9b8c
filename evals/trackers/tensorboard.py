"""TensorBoard: event files in a folder, read by `tensorboard --logdir`; needs no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.tracking import curves_of, figures_of, pictures, refuse_missing, settings_of


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Scalars, learning curves, the configuration and the plots of each run.

    Attributes:
        folder: Where event files go, below the run's own folder unless it is absolute.
    """

    folder: str = "tensorboard"

    def __post_init__(self) -> None:
        refuse_missing("tensorboard", "tensorboard")

    def log(self, result: Mapping[str, Any], out: Path) -> None:
        """Write one event file."""
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(out / self.folder)) as writer:
            settings = {name: f"{value}" for name, value in settings_of(result).items()}
            writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))
            writer.add_text("status", f"{result['status']}: {result['error'] or 'no error'}")
            for name, value in figures_of(result).items():
                writer.add_scalar(name, value, 0)
            for name, epoch, value in curves_of(result):
                writer.add_scalar(name, value, epoch)
            for path in pictures(out):
                with Image.open(path) as picture:
                    writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")
