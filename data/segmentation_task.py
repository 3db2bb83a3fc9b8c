"""The task of naming every pixel's class: a head of queries with masks, or one distribution a pixel.

Shapes: B samples, Q queries, C classes, (h, w) the masks', (H, W) a label map's own. A head of queries gives
(B, Q, C + 1 + h * w): per query the logits of its class, the last of them "no object", and those of its mask,
row by row. A dense head gives (B, C, h, w).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, softplus

from data.base import Batch, Figure, Predictions, divergence_probe, divergences, random_signs
from data.language_modelling import ELEMENTS_AT_ONCE, slices
from utils.errors import InputError

PER_CLASS = ("intersection", "predicted", "labelled")


@dataclass(frozen=True)
class Segmentation:
    """One of `classes` labels per pixel; `labels` (B, H, W), `sizes` (B, 2) where label maps differ in size.

    Label maps of a batch are padded below and to the right; `sizes` says how high and wide each really is.

    Attributes:
        classes: Number of labels, C.
        mask_size: Height and width of a query's mask, (h, w); a dense head may have another.
        ignore_label: Label of pixels that count nowhere.
        names: Of the classes in order; empty: their numbers.
        colours: Of the classes in order, RGB in 0..255, for pictures; empty: drawn from the numbers.
        name: What the task is called.
    """

    classes: int
    mask_size: tuple[int, int]
    ignore_label: int = 255
    names: Sequence[str] = ()
    colours: Sequence[tuple[int, int, int]] = field(default=(), repr=False)
    name: str = "segmentation"

    def __post_init__(self) -> None:
        for what, given in (("names", self.names), ("colours", self.colours)):
            if len(given) not in (0, self.classes):
                raise InputError(f"Segmentation: {what} has {len(given)} entries; must be none or {self.classes}")
        if 0 <= self.ignore_label < self.classes:
            raise InputError(f"Segmentation: ignore_label={self.ignore_label} is one of the {self.classes} classes")

    @property
    def targets(self) -> tuple[str, ...]:
        """None: what is condensed holds all that scoring needs, and label maps are large."""
        return ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Mean intersection over union, and the share of pixels that are right."""
        return ("mean_iou", "pixel_accuracy")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, their numbers where they have none."""
        return tuple(self.names) or tuple(map(str, range(self.classes)))

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of the labelled pixels in nats, at the resolution of the logits.

        A pixel's distribution is its scores divided by their sum; labels come to the logits' resolution by the
        nearest pixel. It is 0 where no pixel is labelled.
        """
        costs, labels = self._costs(logits, batch, label_smoothing)
        return costs.sum() / (labels != self.ignore_label).sum().clamp(min=1)

    def weight(self, batch: Batch) -> int:
        """Its labelled pixels at the masks' size, which a dense head of another size has only about as many of."""
        return int((self._resized(batch, self.mask_size) != self.ignore_label).sum()) if len(batch["labels"]) else 0

    def condensed(self, logits: Tensor, batch: Batch) -> Tensor:
        """Per sample all that scoring needs, (B, 3 * C + 2) in float64, which counts exactly to 2^53.

        Pixels of each class in the intersection, in the prediction and in the label, at the label's own size and
        where it is labelled; then the summed loss in nats and the pixels that it is a sum over.
        """
        rows = []
        for number, labels in enumerate(label_maps(batch)):
            one = logits[number : number + 1]  # alone: its figures must not depend on its neighbours
            found = self.predicted(one, [tuple(labels.shape)])[0]
            costs, small = self._costs(one, {"labels": labels[None]}, 0.0)
            cost = torch.stack((costs.double().sum(), (small != self.ignore_label).double().sum()))
            rows.append(torch.cat((pixel_counts(found, labels, self.classes, self.ignore_label), cost)))
        return torch.stack(rows)

    def mean_loss(self, predictions: Predictions) -> float:
        """Nats per labelled pixel over a whole split."""
        nats, count = self._totals(predictions)[-2:].tolist()
        return nats / max(count, 1)

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """Mean IoU over the classes that occur, with the IoU of each, and the share of pixels that are right.

        Counts are added up over the whole split before anything is divided. A class that neither a label nor a
        prediction has is left out of the mean and listed.
        """
        counts = self._totals(predictions)[:-2].to(torch.int64).view(3, self.classes)
        ious = dict(zip(self.class_names, intersection_over_union(counts), strict=True))
        present = [iou for iou in ious.values() if iou is not None]
        right, _, labelled = counts.sum(dim=1).tolist()
        details: dict[str, Any] = {
            "classes": self.classes, "pixels": labelled, "per_class": ious,
            "absent_classes": [name for name, iou in ious.items() if iou is None],
        }  # fmt: skip
        if not present or not labelled:
            reason = "no pixel of the validation split is labelled"
            return {name: Figure(None, details if name == "mean_iou" else {}, reason) for name in self.metrics}
        mean = sum(present) / len(present)
        return {"mean_iou": Figure(mean, details), "pixel_accuracy": Figure(right / labelled, {"pixels": labelled})}

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Share of each sample's labelled pixels that are right, at the resolution of the logits, (B,)."""
        scores = self.log_scores(logits)
        labels = self._resized(batch, tuple(scores.shape[-2:]))
        right = (scores.argmax(dim=1) == labels).flatten(1).sum(dim=1)
        return {"pixel_accuracy": right / (labels != self.ignore_label).flatten(1).sum(dim=1).clamp(min=1)}

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """`T^2` times the divergence of logits divided by T, the mean over queries (of a dense head: over pixels).

        A query's is the KL of its class and the Bernoulli KL of its mask, averaged over the mask's pixels.
        """
        given, wanted = student.float() / temperature, teacher.float() / temperature
        dense = teacher.ndim == 4
        each = divergences(given, wanted, dim=-3) if dense else query_divergences(given, wanted, self.classes)
        return temperature**2 * each.mean()

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """Each sample's KL of class and mask, summed over queries; of a dense head the KL averaged over pixels.

        Args:
            given: (..., B, Q, C + 1 + h * w) or (..., B, C, h, w) for any leading dimensions.
            wanted: The same without them.
            batch: What they are answers to; all of an image counts, labelled or not.

        Returns:
            (..., B), float32.
        """
        if wanted.ndim == 4:
            rows = [divergences(new, old, dim=-3) for new, old in _row_slices(given, wanted)]
            return torch.cat(rows, dim=-2).mean(dim=(-2, -1))
        total = torch.zeros(given.shape[:-2], device=given.device)
        for part in slices(given):
            total += query_divergences(given[..., part, :], wanted[..., part, :], self.classes).sum(dim=-1)
        return total

    def probe(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """A random scalar of the logits whose square has twice their `deviation` as its mean, to second order."""
        wide = logits.float()
        if logits.ndim == 4:
            wide = wide.movedim(1, -1)  # (B, h, w, C)
            pixels = wide.shape[1] * wide.shape[2]
            return (divergence_probe(wide.detach().softmax(dim=-1), generator) * wide).sum() / pixels**0.5
        of_class, of_mask = wide[..., : self.classes + 1], wide[..., self.classes + 1 :]
        shares, inside = of_class.detach().softmax(dim=-1), of_mask.detach().sigmoid()
        spread = (inside * (1 - inside) / of_mask.shape[-1]).sqrt()  # of a pixel, of which the average is taken
        drawn = divergence_probe(shares, generator) * of_class
        return drawn.sum() + (spread * random_signs(spread, generator) * of_mask).sum()

    def misfit(self, logits: Tensor) -> str | None:
        """Refuse another number of classes, another size of masks, and heads of another kind."""
        shape = ", ".join(["B", *map(str, logits.shape[1:])])
        if logits.ndim == 4:
            fits = logits.shape[1] == self.classes
            return None if fits else f"the model's logits have shape ({shape}), the data has {self.classes} classes"
        (h, w), classes = self.mask_size, self.classes
        if logits.ndim != 3:
            wanted = f"(B, Q, {classes + 1 + h * w}) or (B, {classes}, h, w)"
            return f"the model's logits have shape ({shape}), the data needs {wanted}: a class for every pixel"
        if logits.shape[2] == classes + 1 + h * w:
            return None
        others = logits.shape[2] - 1 - h * w
        found = f"masks of {h}x{w} leave {others} classes" if others > 0 else f"masks of {h}x{w} alone are more"
        return (
            f"the model's logits have shape ({shape}); of these {logits.shape[2]} numbers a query, {found}; the data "
            f"has {classes} classes and needs {classes} + 1 + {h} * {w} = {classes + 1 + h * w}: another number of "
            "classes, or masks of another size"
        )

    def log_scores(self, logits: Tensor) -> Tensor:
        """Logarithms of every pixel's scores up to a constant, (B, C, h, w) in float32: a softmax normalises them."""
        if logits.ndim == 4:
            return logits.float()
        return semantic_scores(logits, self.classes, self.mask_size).clamp_min(torch.finfo(torch.float32).tiny).log()

    def predicted(self, logits: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The class of every pixel at each sample's own size, (H, W) int64 each."""
        found = []
        for one, size in zip(logits.split(1), sizes, strict=True):
            dense = one.ndim == 4
            scores = one.float() if dense else semantic_scores(one, self.classes, self.mask_size)
            found.append(likeliest(scores[0], size))
        return found

    def _resized(self, batch: Batch, size: tuple[int, ...]) -> Tensor:
        return torch.stack([nearest(labels, size) for labels in label_maps(batch)])  # (B, h, w)

    def _costs(self, logits: Tensor, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor]:
        """Nats of every pixel, zero where it is not labelled, and its label; (B, h, w) both."""
        scores = self.log_scores(logits)
        labels = self._resized(batch, tuple(scores.shape[-2:]))
        ignored = self.ignore_label
        costs = cross_entropy(scores, labels, ignore_index=ignored, reduction="none", label_smoothing=smoothing)
        return costs, labels

    def _totals(self, predictions: Predictions) -> Tensor:
        total = torch.zeros(len(PER_CLASS) * self.classes + 2, dtype=torch.float64)
        for counts, _ in predictions:
            for row in counts.cpu():  # one by one: sums must not depend on how samples were batched
                total += row
        return total


def semantic_scores(logits: Tensor, classes: int, mask_size: tuple[int, int]) -> Tensor:
    """Per pixel and class the sum over queries of the class's probability times the mask's.

    `sum_q softmax(class_q)[c] * sigmoid(mask_q)[pixel]`, "no object" left out of the classes but not of the
    softmax (Cheng et al., MaskFormer, NeurIPS 2021, arXiv:2107.06278, section 3.4).

    Args:
        logits: (B, Q, C + 1 + h * w).
        classes: C.
        mask_size: (h, w).

    Returns:
        (B, C, h, w), float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits.float()
        shares = wide[..., : classes + 1].softmax(dim=-1)[..., :-1]  # (B, Q, C)
        scores = shares.mT @ wide[..., classes + 1 :].sigmoid()  # (B, C, h * w)
        return scores.unflatten(-1, mask_size)  # (B, C, h, w)


def likeliest(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """The class with the highest score once scores are resized, the first of equals.

    Scores are resized bilinearly, some classes at a time: all 150 of ADE20K at the size of a large photo take
    gigabytes.

    Args:
        scores: (C, h, w).
        size: (H, W).

    Returns:
        (H, W) int64.
    """
    step = max(1, ELEMENTS_AT_ONCE // (size[0] * size[1]))
    best, found = torch.full(size, -torch.inf, device=scores.device), torch.zeros(0)
    for first in range(0, len(scores), step):
        part = scores[None, first : first + step]
        values, classes = interpolate(part, size, mode="bilinear", align_corners=False)[0].max(dim=0)
        found = torch.where(values > best, classes + first, found) if first else classes
        best = torch.maximum(best, values)
    return found


def nearest(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """A label map at another size by the pixel that lies nearest, (H, W) to (h, w)."""
    if tuple(labels.shape) == tuple(size):
        return labels
    # centre of the new pixel i among the old ones, in whole numbers: floor((i + 1/2) * H / h)
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def label_maps(batch: Batch) -> Iterator[Tensor]:
    """Each sample's label map without what a batch was padded by, (H, W) int64."""
    labels = batch["labels"]
    sizes: list[list[int]] = batch["sizes"].tolist() if "sizes" in batch else [list(labels.shape[1:])] * len(labels)
    return (one[: size[0], : size[1]] for one, size in zip(labels, sizes, strict=True))


def pixel_counts(predicted: Tensor, labels: Tensor, classes: int, ignored: int) -> Tensor:
    """Pixels of each class in intersection, prediction and label where a label is, (3 * C,) float64.

    Args:
        predicted: (H, W).
        labels: (H, W), each a class or `ignored`.
        classes: C.
        ignored: Label that is none.
    """
    real = labels != ignored
    mine, theirs = predicted[real], labels[real]
    parts = (theirs[mine == theirs], mine, theirs)
    return torch.cat([torch.bincount(part, minlength=classes) for part in parts]).double()


def intersection_over_union(counts: Tensor) -> list[float | None]:
    """IoU of each class from its pixels (3, C); None where neither label nor prediction has any."""
    both, predicted, labelled = counts.tolist()
    unions = [p + t - b for b, p, t in zip(both, predicted, labelled, strict=True)]
    return [b / union if union else None for b, union in zip(both, unions, strict=True)]


def query_divergences(given: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Per query the KL of its class plus the Bernoulli KL of its mask averaged over pixels, (..., B, Q)."""
    of_class = divergences(given[..., : classes + 1], wanted[..., : classes + 1])
    return of_class + bernoulli_divergence(given[..., classes + 1 :], wanted[..., classes + 1 :]).mean(dim=-1)


def bernoulli_divergence(given: Tensor, wanted: Tensor) -> Tensor:
    """`KL(Bernoulli(sigmoid(wanted)) || Bernoulli(sigmoid(given)))` of each pixel, in float32."""
    new, old = given.float(), wanted.float()
    # p log(p / q) + (1 - p) log((1 - p) / (1 - q)) with log(1 - p) = -softplus(old) and log p = old - softplus(old)
    return softplus(new) - softplus(old) - old.sigmoid() * (new - old)


def _row_slices(given: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both heads' (..., C, h, w) some rows at a time, few enough to be held in float32."""
    height = given.shape[-2]
    step = max(1, ELEMENTS_AT_ONCE * height // max(1, given.numel()))
    return ((given[..., r : r + step, :], wanted[..., r : r + step, :]) for r in range(0, height, step))
