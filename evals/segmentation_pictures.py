"""Pictures of segmentations: a few validation images, their labels, and what dense and pruned models see in them.

Shapes: (H, W) the size of a label map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from data.base import DataBundle
from data.segmentation_task import Segmentation, label_maps
from evals.palette import spread_colours
from evals.plots import save_figure
from models.base import Batch, PrunableModel
from models.preprocessing import ImagePreprocessing

SAMPLES = 4
NAMED = 30  # classes that the legend has room for, the largest first
COLUMNS = 6
PANEL, ENTRY, HEADING = 2.3, 0.17, 0.25  # inches: width of a panel, height of a line of the legend, of the headings
GREY = (222, 222, 222)  # of pixels that no label counts


@dataclass(frozen=True)
class Sample:
    """One validation image and all that is said about it.

    Attributes:
        image: RGB in [0, 1], (h, w, 3), at the model's input size.
        maps: Label maps by what the column is called, the true one first, (H, W) each.
    """

    image: np.ndarray
    maps: Mapping[str, np.ndarray]


def draw_segmentations(models: Mapping[str, PrunableModel], data: DataBundle, out: Path) -> list[str]:
    """Draw label maps of a few validation images into `out/plots`; returns the paths relative to `out`.

    Args:
        models: The models by what their column is called.
        data: Source of the images; nothing is drawn for another task than segmentation.
        out: Folder of the run.
    """
    if not isinstance(data.task, Segmentation):
        return []
    figure = segmentations(samples_of(models, data, data.task), data.task)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    save_figure(figure, out / "plots" / "segmentations.png")
    return ["plots/segmentations.png"]


@torch.inference_mode()
def samples_of(models: Mapping[str, PrunableModel], data: DataBundle, task: Segmentation) -> list[Sample]:
    """The first validation images with their labels, and what each model makes of them."""
    found: list[Sample] = []
    for batch in data.validation:
        rows = slice(SAMPLES - len(found))
        found += _answered(models, {name: tensor[rows] for name, tensor in batch.items()}, task)
        if len(found) == SAMPLES:
            break
    return found


def _answered(models: Mapping[str, PrunableModel], batch: Batch, task: Segmentation) -> list[Sample]:
    labels = list(label_maps(batch))
    sizes = [tuple(one.shape) for one in labels]
    maps = {"label": labels} | {
        name: task.predicted(model.logits(model.place(batch)), sizes) for name, model in models.items()
    }
    form = next(iter(models.values())).preprocessing
    return [
        Sample(displayed(image, form), {name: found[number].cpu().numpy() for name, found in maps.items()})
        for number, image in enumerate(batch["inputs"])
    ]


def displayed(image: Tensor, form: object) -> np.ndarray:
    """An input (3, h, w) as RGB in [0, 1], (h, w, 3): what it was normalised by is taken back."""
    wide = image.float().cpu()
    if isinstance(form, ImagePreprocessing):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (form.mean, form.std))
        wide = wide * std + mean
    else:
        wide = (wide - wide.min()) / (wide.max() - wide.min()).clamp_min(1e-12)
    return wide.clamp(0, 1).permute(1, 2, 0).numpy()  # (3, h, w) -> (h, w, 3)


def segmentations(samples: Sequence[Sample], task: Segmentation) -> Figure:
    """One row a sample: the image, its label map and the predicted ones, with a legend of the classes in them."""
    colours = np.array([*(task.colours or spread_colours(task.classes)), GREY], dtype=np.float64) / 255
    titles = ["image", *samples[0].maps]
    heights = [PANEL * one.maps["label"].shape[0] / one.maps["label"].shape[1] for one in samples]
    entries = _legend(samples, task, colours)
    below = ENTRY * -(-len(entries) // COLUMNS) + 0.1
    tall = sum(heights) + HEADING + below
    figure = Figure(figsize=(PANEL * len(titles), tall))
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=below / tall, top=1 - HEADING / tall, wspace=0.02, hspace=0.03
    )
    panels = figure.subplots(len(samples), len(titles), squeeze=False, height_ratios=heights)
    for row, sample in zip(panels, samples, strict=True):
        height, width = sample.maps["label"].shape
        pictures = [sample.image, *(colours[_known(one, task)] for one in sample.maps.values())]
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
            axes.set_axis_off()
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=8, pad=3)
    figure.legend(handles=entries, loc="lower center", ncols=COLUMNS, fontsize=7, frameon=False, borderpad=0.2,
                  labelspacing=0.25, handlelength=1.2, handleheight=1.0, columnspacing=1.0)  # fmt: skip
    return figure


def _known(labels: np.ndarray, task: Segmentation) -> np.ndarray:
    """A label map with one class more, of ignored pixels."""
    return np.where(labels == task.ignore_label, task.classes, labels)


def _legend(samples: Sequence[Sample], task: Segmentation, colours: np.ndarray) -> list[Patch]:
    """An entry for each class that is to be seen, the largest first."""
    shown = [_known(one, task).ravel() for sample in samples for one in sample.maps.values()]
    areas = np.bincount(np.concatenate(shown), minlength=task.classes + 1)
    names = [*task.class_names, "not labelled"]
    order = [number for number in np.argsort(-areas, kind="stable") if areas[number]]
    entries = [Patch(facecolor=tuple(colours[number]), label=names[number]) for number in order[:NAMED]]
    if more := len(order) - len(entries):
        entries.append(Patch(facecolor="none", edgecolor="none", label=f"and {more} more"))
    return entries
