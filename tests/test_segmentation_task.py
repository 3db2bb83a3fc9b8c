"""Mean IoU and the other figures of a segmentation, held against loops over pixels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from data.base import Batch, Condensing, Scored, Weighing
from data.segmentation_task import (
    Segmentation,
    bernoulli_divergence,
    intersection_over_union,
    likeliest,
    nearest,
    semantic_scores,
)
from utils.errors import InputError

C, Q, MASK = 4, 3, (4, 6)
TASK = Segmentation(C, MASK, names=("road", "car", "sky", "train"))
SIZES = ((9, 14), (16, 5), (4, 6), (7, 7))


def queries(samples: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(samples, Q, C + 1 + 24, generator=torch.Generator().manual_seed(seed)) * scale


def batch_of(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 1, classes: int = C) -> Batch:
    """Label maps of their own sizes with some ignored pixels, padded to the largest."""
    draw = np.random.default_rng(seed)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    labels = torch.full((len(sizes), height, width), 255)
    for number, (h, w) in enumerate(sizes):
        own = draw.integers(0, classes, (h, w))
        own[draw.random((h, w)) < 0.2] = 255
        labels[number, :h, :w] = torch.from_numpy(own)
    return {"labels": labels, "sizes": torch.tensor(sizes)}


def rows_of(batch: Batch, chosen: slice) -> Batch:
    """The same samples, padded to no more than they need."""
    sizes = batch["sizes"][chosen]
    height, width = sizes.amax(dim=0).tolist()
    return {"labels": batch["labels"][chosen, :height, :width], "sizes": sizes}


def slow_scores(logits: Tensor) -> Tensor:
    found = torch.zeros(len(logits), C, *MASK)
    for b, one in enumerate(logits):
        for c in range(C):
            for row in range(MASK[0]):
                for column in range(MASK[1]):
                    for q in range(Q):
                        share = one[q, : C + 1].softmax(0)[c]
                        found[b, c, row, column] += share * one[q, C + 1 + row * MASK[1] + column].sigmoid()
    return found


def slow_ious(logits: Tensor, batch: Batch) -> tuple[list[float | None], float]:
    """IoU of each class, and the share of right pixels, one pixel after another."""
    scores = slow_scores(logits) if logits.ndim == 3 else logits
    both, either, right, total = [0] * C, [0] * C, 0, 0
    for score, labels, size in zip(scores, batch["labels"], batch["sizes"].tolist(), strict=True):
        own = interpolate(score[None], size, mode="bilinear", align_corners=False)[0]
        for row in range(size[0]):
            for column in range(size[1]):
                label, found = int(labels[row, column]), int(own[:, row, column].argmax())
                if label == 255:
                    continue
                total, right = total + 1, right + (label == found)
                for c in range(C):
                    both[c] += label == c and found == c
                    either[c] += label == c or found == c
    return [b / e if e else None for b, e in zip(both, either, strict=True)], right / total


@pytest.mark.parametrize("dense", [False, True], ids=["queries", "dense"])
def test_figures_equal_a_loop_over_pixels(dense: bool) -> None:
    batch = batch_of()
    logits = torch.randn(4, C, *MASK, generator=torch.Generator().manual_seed(3)) if dense else queries(4)
    ious, right = slow_ious(logits, batch)
    figures = TASK.figures([(TASK.condensed(logits, batch), {})])
    assert list(figures) == ["mean_iou", "pixel_accuracy"] == list(TASK.metrics)
    assert figures["mean_iou"].details["per_class"] == dict(zip(TASK.names, ious, strict=True))
    assert figures["mean_iou"].value == pytest.approx(sum(i for i in ious if i is not None) / 4, abs=1e-12)
    assert figures["pixel_accuracy"].value == pytest.approx(right, abs=1e-12)
    assert isinstance(TASK, Condensing) and isinstance(TASK, Scored) and TASK.targets == ()


def test_scores_of_queries_are_sums_of_class_times_mask() -> None:
    logits = queries(2)
    torch.testing.assert_close(semantic_scores(logits, C, MASK), slow_scores(logits))
    assert not torch.allclose(semantic_scores(logits, C, MASK), slow_scores(logits.flip(1) * 0.5))


def test_uneven_batches_are_exactly_one_batch() -> None:
    batch, logits = batch_of(), queries(4)
    whole = [(TASK.condensed(logits, batch), {})]
    parts = [(TASK.condensed(logits[p], rows_of(batch, p)), {}) for p in (slice(0, 1), slice(1, 4))]
    assert TASK.figures(whole) == TASK.figures(parts) and TASK.mean_loss(whole) == TASK.mean_loss(parts)
    padded = batch | {"labels": torch.nn.functional.pad(batch["labels"], (0, 5, 0, 3), value=2)}
    assert torch.equal(TASK.condensed(logits, padded), whole[0][0]), "what lies beyond a label's size counts nowhere"
    summed = [(sum(counts.sum(dim=0, keepdim=True) for counts, _ in parts), {})]  # as ranks would
    assert TASK.figures(summed) == TASK.figures(whole)  # type: ignore[arg-type]


def test_ignored_pixels_count_nowhere() -> None:
    batch = batch_of()
    logits = queries(4)
    before = TASK.condensed(logits, batch)
    found = TASK.predicted(logits, SIZES)
    changed = batch["labels"].clone()
    changed[0, :9, :14] = torch.where(changed[0, :9, :14] == found[0], changed[0, :9, :14], 255)
    after = TASK.condensed(logits, batch | {"labels": changed})
    right = int(before[0, :C].sum())
    assert int(after[0, :C].sum()) == int(after[0, C : 2 * C].sum()) == int(after[0, 2 * C : 3 * C].sum()) == right
    assert torch.equal(after[1:], before[1:])
    nothing = batch | {"labels": torch.full_like(batch["labels"], 255)}
    figures = TASK.figures([(TASK.condensed(logits, nothing), {})])
    assert all(f.value is None and "no pixel" in str(f.reason) for f in figures.values())
    assert float(TASK.loss(logits, nothing)) == 0.0


def test_an_absent_class_is_left_out_and_listed() -> None:
    dense = torch.full((1, C, *MASK), -9.0)
    dense[:, 0, :, :3], dense[:, 1, :, 3:] = 9.0, 9.0
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[:, :, 3:] = 2  # a class that is labelled and never predicted counts as 0; one of neither counts nowhere
    figure = TASK.figures([(TASK.condensed(dense, {"labels": labels}), {})])["mean_iou"]
    assert figure.details["per_class"] == {"road": 1.0, "car": 0.0, "sky": 0.0, "train": None}
    assert figure.value == pytest.approx(1 / 3) and figure.details["absent_classes"] == ["train"]


def test_counts_stay_exact_where_float32_would_not() -> None:
    row = torch.tensor([[2**24, 0, 0, 0] + [2**24, 1, 0, 0] + [2**24, 1, 0, 0] + [0.0, 1.0]], dtype=torch.float64)
    figure = TASK.figures([(row, {}), (torch.tensor([[1.0, *[0] * 3, 1, *[0] * 3, 1, *[0] * 5]]), {})])["mean_iou"]
    assert figure.details["pixels"] == 2**24 + 2 and figure.details["per_class"]["road"] == 1.0
    assert TASK.condensed(queries(1), batch_of(SIZES[:1])).dtype == torch.float64
    assert intersection_over_union(torch.tensor([[1], [2], [4]])) == [0.2]


def test_predictions_are_resized_to_the_label_whatever_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(C, *MASK)
    whole = likeliest(scores, (31, 17))
    assert torch.equal(whole, interpolate(scores[None], (31, 17), mode="bilinear")[0].argmax(dim=0))
    monkeypatch.setattr("data.segmentation_task.ELEMENTS_AT_ONCE", 1)
    assert torch.equal(likeliest(scores, (31, 17)), whole)
    assert torch.equal(likeliest(torch.zeros(C, *MASK), (3, 3)), torch.zeros(3, 3, dtype=torch.int64)), (
        "ties: the first"
    )
    assert likeliest(scores, (1, 2)).shape == (1, 2)


def test_labels_come_to_another_size_by_the_nearest_pixel() -> None:
    labels = torch.arange(12 * 8).view(12, 8)
    for size in ((3, 2), (12, 8), (24, 8), (5, 7), (1, 1)):
        expected = interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        assert torch.equal(nearest(labels, size), expected), size


def test_loss_is_the_nll_of_scores_divided_by_their_sum() -> None:
    batch, logits = batch_of(((4, 6), (4, 6))), queries(2)
    scores = slow_scores(logits)
    shares = scores / scores.sum(dim=1, keepdim=True)
    total, count = 0.0, 0
    for b in range(2):
        for row in range(4):
            for column in range(6):
                if (label := int(batch["labels"][b, row, column])) != 255:
                    total, count = total - math.log(shares[b, label, row, column]), count + 1
    assert float(TASK.loss(logits, batch)) == pytest.approx(total / count, rel=1e-5)
    assert TASK.mean_loss([(TASK.condensed(logits, batch), {})]) == pytest.approx(total / count, rel=1e-6)
    dense = torch.randn(2, C, 4, 6)
    assert float(TASK.loss(dense, batch, 0.1)) == pytest.approx(
        float(cross_entropy(dense, batch["labels"], ignore_index=255, label_smoothing=0.1)), rel=1e-5
    )
    extreme = (queries(2) * 100).requires_grad_()
    loss = TASK.loss(extreme, batch)
    loss.backward()
    assert torch.isfinite(loss) and extreme.grad is not None and torch.isfinite(extreme.grad).all()


def test_the_loss_of_a_batch_is_that_of_its_parts_by_their_weights() -> None:
    batch, logits = batch_of(), queries(4)
    parts = [slice(0, 1), slice(1, 4)]
    weights = [TASK.weight(rows_of(batch, part)) for part in parts]
    losses = [float(TASK.loss(logits[part], rows_of(batch, part))) for part in parts]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert sum(weights) == TASK.weight(batch) and float(TASK.loss(logits, batch)) == pytest.approx(mean, rel=1e-6)
    assert isinstance(TASK, Weighing) and TASK.weight({name: rows[:0] for name, rows in batch.items()}) == 0


def test_quality_is_the_share_of_right_pixels_of_each_sample() -> None:
    batch, dense = batch_of(((4, 6), (4, 6))), torch.randn(2, C, 4, 6)
    real = batch["labels"] != 255
    right = ((dense.argmax(dim=1) == batch["labels"]) & real).sum(dim=(1, 2)) / real.sum(dim=(1, 2))
    torch.testing.assert_close(TASK.quality(dense, batch)["pixel_accuracy"], right)


def slow_deviation(given: Tensor, wanted: Tensor) -> float:
    """Of one sample: over queries the KL of classes, and the mean over pixels of the Bernoulli KL."""
    total = 0.0
    for new, old in zip(given.double(), wanted.double(), strict=True):
        p, q = old[: C + 1].softmax(0), new[: C + 1].softmax(0)
        total += float((p * (p / q).log()).sum())
        p, q = old[C + 1 :].sigmoid(), new[C + 1 :].sigmoid()
        total += float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
    return total


def test_deviation_equals_a_loop_for_any_leading_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, given = queries(2, 1), torch.stack([queries(2, seed) for seed in range(2, 8)]).unflatten(0, (2, 3))
    found = TASK.deviation(given, wanted, {})
    expected = [[[slow_deviation(given[i, j, b], wanted[b]) for b in range(2)] for j in range(3)] for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("data.language_modelling.ELEMENTS_AT_ONCE", 1)
    torch.testing.assert_close(TASK.deviation(given, wanted, {}), found)
    assert TASK.deviation(wanted, wanted, {}).abs().max() < 1e-5 < found.min()


def test_deviation_of_a_dense_head_is_averaged_over_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, given = torch.randn(2, C, 4, 6), torch.randn(5, 2, C, 4, 6)
    p, q = wanted.softmax(1), given.softmax(2)
    expected = (p * (p / q).log()).sum(dim=2).mean(dim=(2, 3))
    torch.testing.assert_close(TASK.deviation(given, wanted, {}), expected)
    monkeypatch.setattr("data.segmentation_task.ELEMENTS_AT_ONCE", 1)
    torch.testing.assert_close(TASK.deviation(given, wanted, {}), expected)


def test_divergence_for_distillation() -> None:
    student, teacher = queries(2, 1), queries(2, 2)
    each = [slow_deviation(s / 2, t / 2) for s, t in zip(student, teacher, strict=True)]
    assert float(TASK.divergence(student, teacher, 2.0)) == pytest.approx(4 * sum(each) / (2 * Q), rel=1e-4)
    assert float(TASK.divergence(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    dense = torch.randn(2, 2, C, 4, 6)
    found = float(TASK.divergence(dense[0], dense[1], 1.0))
    assert found == pytest.approx(float(TASK.deviation(dense[0], dense[1], {}).mean()), rel=1e-5)
    learnt = student.clone().requires_grad_()
    TASK.divergence(learnt, teacher, 2.0).backward()
    assert learnt.grad is not None and learnt.grad.abs().min() > 0


def test_bernoulli_divergence_of_certain_masks_is_finite() -> None:
    sure = torch.tensor([-80.0, 80.0, 300.0])
    assert bernoulli_divergence(sure, sure).tolist() == [0, 0, 0]
    torch.testing.assert_close(bernoulli_divergence(-sure, sure), sure.abs())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, Q, C + 1 + 24), None),
        ((1, C, 5, 5), None),
        ((1, C + 2, 5, 5), "shape (B, 6, 5, 5), the data has 4 classes"),
        ((1, Q, C + 3 + 24), "masks of 4x6 leave 6 classes; the data has 4 classes and needs 4 + 1 + 4 * 6 = 29"),
        ((1, Q, C + 1 + 6), "masks of 4x6 alone are more"),
        ((1, 10), "a class for every pixel"),
    ],
)
def test_misfits(shape: tuple[int, ...], words: str | None) -> None:
    found = TASK.misfit(torch.zeros(shape))
    assert found is None if words is None else words in str(found)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"names": ("a",)}, "names has 1 entries"), ({"ignore_label": 3}, "ignore_label=3 is one of the 4 classes")],
)
def test_bad_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Segmentation(C, MASK, **given)
