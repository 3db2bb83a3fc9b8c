"""Pictures of dropped tokens: how many stay block by block, and which patches of a few images.

Shapes: B images, T tokens, H height and W width in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data.base import DataBundle
from evals.base import Measurements
from evals.plots import KEPT, LINE, save_figure
from models.base import Batch, PrunableModel
from models.keeping import Keeping
from models.keeping_flow import flow_of, watched_tokens

IMAGES = 6
FADED = 0.25
TINT = np.array([0.93, 0.60, 0.50])  # a colour that neither white nor black patches have


def draw_token_plots(model: PrunableModel, data: DataBundle, found: Measurements, out: Path) -> list[str]:
    """Draw what a model that drops tokens keeps into `out/plots`; returns the paths relative to `out`.

    Args:
        model: The pruned model; nothing is drawn of one that drops no token.
        data: Source of the images.
        found: What was measured of the model.
        out: Folder of the run.
    """
    if not isinstance(model.reduction, Keeping) or not model.reduction.merges:
        return []
    drawn: dict[str, Figure] = {}
    if (macs := found.get("macs")) and (rows := macs.details.get("kept_tokens")):
        drawn["kept_tokens.png"] = tokens_kept(rows)
    if (picture := surviving_patches(model, data)) is not None:
        drawn["surviving_patches.png"] = picture
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        save_figure(figure, out / "plots" / name)
    return [f"plots/{name}" for name in drawn]


def tokens_kept(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean, 95th percentile and maximum of the tokens that enter the MLP of each block."""
    figure = Figure(figsize=(5.6, 3.6))
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.14, top=0.88)
    axes = figure.subplots()
    at = np.arange(len(rows))
    mlp = [row["mlp"] for row in rows]
    axes.bar(at, [m["mean"] for m in mlp], color=KEPT, label="mean")
    for what, marker in (("p95", "_"), ("max", "^")):
        axes.plot(at, [m[what] for m in mlp], linestyle="", marker=marker, color=LINE, label=what)
    axes.set(xlabel="layer", ylabel="tokens in the MLP", title="tokens kept on the validation split")
    axes.set_xticks(at, [str(row["layer"]) for row in rows])
    axes.set_ylim(0, max(m["max"] for m in mlp) * 1.15)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="lower left")
    return figure


def surviving_patches(model: PrunableModel, data: DataBundle) -> Figure | None:
    """A few validation images, and what is left of them after each block that drops tokens; None if no images."""
    batch = next(iter(data.validation))
    images = batch.get("inputs")
    if images is None or images.ndim != 4:
        return None
    count = min(IMAGES, len(images))
    rows = torch.arange(count) * len(images) // count  # spread out: neighbours are often of one class
    chosen = {name: tensor[rows] for name, tensor in batch.items()}
    layers, positions, tokens = _survivors(model, chosen)
    grid = patch_grid(tokens - model.protected_tokens, *images.shape[-2:])
    if grid is None or not layers:
        return None
    masks = [kept_patches(found, model.protected_tokens, grid) for found in positions]
    return _drawn(chosen["inputs"], layers, masks)


@torch.inference_mode()
def _survivors(model: PrunableModel, batch: Batch) -> tuple[list[int], list[Tensor], int]:
    """The blocks that drop tokens, where their tokens stood, and how many there were."""
    with watched_tokens(flow_of(model)) as flow:
        model.logits(model.place(batch))
        seen, keeping = flow.seen, flow.keeping
    assert seen is not None
    layers = [layer for step, layer in enumerate(keeping.layers) if not keeping.rule.idle(step)]
    return layers, [seen.positions[layer].cpu() for layer in layers], seen.width


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches that tile an image; None if so many don't."""
    rows = round((patches * height / width) ** 0.5)
    fits = rows > 0 and patches % rows == 0 and height * (patches // rows) == width * rows
    return (rows, patches // rows) if fits else None


def kept_patches(positions: Tensor, front: int, grid: tuple[int, int]) -> Tensor:
    """Which patches are left, (B, rows, columns) bool, from where tokens stood, (B, T)."""
    left = torch.zeros(len(positions), grid[0] * grid[1] + 1, dtype=torch.bool)
    # tokens in front of the patches, padding and fused ones all go to a place of their own behind
    index = torch.where(positions >= front, positions - front, grid[0] * grid[1])
    return left.scatter_(1, index, True)[:, :-1].unflatten(1, grid)


def _drawn(images: Tensor, layers: Sequence[int], masks: Sequence[Tensor]) -> Figure:
    shown = [_displayed(image) for image in images]
    figure = Figure(figsize=(1.5 * (1 + len(layers)), 1.5 * len(shown) + 0.3))
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.35 / (1.5 * len(shown) + 0.3), wspace=0.04, hspace=0.04
    )
    panels = figure.subplots(len(shown), 1 + len(layers), squeeze=False)
    for row, image in enumerate(shown):
        pictures = [image, *(_faded(image, mask[row]) for mask in masks)]
        for axes, picture in zip(panels[row], pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    for axes, title in zip(panels[0], ("image", *(f"block {layer}" for layer in layers)), strict=True):
        axes.set_title(title, fontsize=8)
    return figure


def _displayed(image: Tensor) -> np.ndarray:
    """An image as RGB in [0, 1], (H, W, 3), whatever it was normalised by."""
    wide = image.float().cpu()
    wide = (wide - wide.min()) / (wide.max() - wide.min()).clamp_min(1e-12)
    channels = wide if len(wide) == 3 else wide[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)


def _faded(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The image with what is gone tinted."""
    height, width = image.shape[:2]
    full = np.kron(mask.numpy(), np.ones((height // mask.shape[0], width // mask.shape[1]), dtype=bool))
    return np.where(full[..., None], image, FADED * image + (1 - FADED) * TINT)
