"""Runs on segmentation data, end to end: figures, pictures, what two heads and two data sets leave."""

import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.ade20k import ade20k
from data.base import prepared
from evals.base import Subject
from evals.class_table import class_block
from evals.mean_iou import MeanIoU
from evals.palette import spread_colours
from evals.quality import Quality
from evals.segmentation_pictures import displayed, samples_of, segmentations
from main import run
from tests.conftest import Compose
from tests.mask2former_models import LEAST, SETTINGS
from tests.segmenters import segmenter, write_ade20k, write_cityscapes
from utils.errors import InputError

SMALL = ("data.batch_size=2", "data.calibration_batches=2", "data.calibration_batch_size=2", "data.workers=0")


def overrides(root: Path, data: str, storage: Path, *more: str) -> list[str]:
    chosen = [f"data={data}", f"data.root={root}", *SMALL, "prune=magnitude", "prune.ratio=0.3", "prune.budget=width"]
    return [*chosen, f"storage={storage}", *more]


def config(composed: Compose, root: Path, data: str, storage: Path, *more: str, **model: Any) -> Any:
    cfg = composed(*overrides(root, data, storage, *more))
    cfg.model = OmegaConf.create({"_target_": "tests.segmenters.segmenter", "classes": cfg.data.classes, **model})
    return cfg


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cityscapes(tmp_path_factory.mktemp("cities"), train=6, validation=3)


def test_a_run_with_recovery_on_cityscapes(composed: Compose, cities: Path, tmp_path: Path) -> None:
    training = {"_target_": "utils.training.Training", "epochs": 2, "learning_rate": 0.01, "label_smoothing": 0.0}
    more = ("evals=[quality,loss,mean_iou]", "recover=distill", "recover.epochs=1")
    record = run(
        config(composed, cities, "cityscapes", tmp_path / "storage", *more, training=training), tmp_path / "out"
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record.status == "ok" and list(result["pruned"]) == ["mean_iou", "pixel_accuracy", "loss"]
    found = result["pruned"]["mean_iou"]
    per_class = [iou for iou in found["per_class"].values() if iou is not None]
    assert found["value"] == pytest.approx(sum(per_class) / len(per_class)) and found["unit"] == "fraction"
    assert set(found["absent_classes"]) | {n for n, i in found["per_class"].items() if i is not None} == set(
        found["per_class"]
    )
    assert result["history"][-1]["validation_pixel_accuracy"] >= 0 and len(result["recovery"]["history"]) >= 1
    report, page = ((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert "![segmentations](plots/segmentations.png)" in report and "## IoU of each class" in report
    assert "| road | " in report and "images are scaled whole to 32x64" in report
    picture = (tmp_path / "out" / "plots" / "segmentations.png").read_bytes()
    (inside,) = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert b64decode(inside) == picture and "<td class='text'>road</td>" in page


@pytest.mark.parametrize("queries", [0, 5])
def test_both_heads_on_ade20k_by_every_simple_method(composed: Compose, tmp_path: Path, queries: int) -> None:
    root = write_ade20k(tmp_path / "ade")
    for method in ("fisher", "optin"):
        more = ("evals=[mean_iou]", f"prune={method}", *(("prune.engine=exact",) if method == "optin" else ()))
        given = config(composed, root, "ade20k", tmp_path / "storage", *more, queries=queries)
        record = run(given, tmp_path / method)
        assert record.status == "ok" and 0 < record.plan.ratio_reached < 1  # type: ignore[union-attr]
        assert 0 <= record.pruned["mean_iou"].value <= 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"classes": 20}, r"shape \(B, 20, 8, 16\), the data has 19 classes"),
        ({"classes": 150, "queries": 3}, "masks of 8x16 leave 150 classes; the data has 19 classes"),
    ],
)
def test_a_model_of_other_classes_is_refused(
    composed: Compose, cities: Path, tmp_path: Path, model: Any, words: str
) -> None:
    with pytest.raises(InputError, match=f"model=segmenter does not fit data=cityscapes: .*{words}"):
        run(config(composed, cities, "cityscapes", tmp_path / "storage", **model), tmp_path / "out")


def test_mean_iou_is_refused_where_there_is_none(composed: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evals=mean_iou: data=digits is scored by accuracy; use evals=\[quality\]"):
        run(composed("evals=[mean_iou]", f"storage={tmp_path}/s"), tmp_path / "out")
    with pytest.raises(InputError, match="evals=accuracy: data=ade20k is scored by mean_iou, pixel_accuracy"):
        root = write_ade20k(tmp_path / "ade")
        run(config(composed, root, "ade20k", tmp_path / "s", "evals=[accuracy]"), tmp_path / "out")


def test_the_metric_is_the_tasks_own_figure(tmp_path: Path) -> None:
    model = segmenter(classes=150)
    data = prepared(ade20k(root=str(write_ade20k(tmp_path)), batch_size=3, calibration_batches=1,
                           calibration_batch_size=2, workers=0), model)  # fmt: skip
    subject = Subject(model, data)
    (found,) = MeanIoU().measure([subject])
    assert found == {"mean_iou": Quality().measure([subject])[0]["mean_iou"]}


def test_pictures_show_image_label_and_both_predictions(tmp_path: Path) -> None:
    dense, pruned = segmenter(classes=150), segmenter(classes=150, channels=3)
    source = ade20k(root=str(write_ade20k(tmp_path)), batch_size=3, calibration_batches=1, calibration_batch_size=2,
                    workers=0)  # fmt: skip
    data = prepared(source, dense)
    task: Any = data.task
    samples = samples_of({"dense": dense, "pruned": pruned}, data, task)
    assert [list(sample.maps) for sample in samples] == [["label", "dense", "pruned"]] * 4
    assert samples[0].maps["label"].shape == samples[0].maps["pruned"].shape == (40, 52)
    assert (samples[3].maps["dense"] != samples[3].maps["pruned"]).any()
    image = matplotlib.image.imread(tmp_path / "images/validation/ADE_0000.jpg") / 255
    assert abs(samples[0].image.mean() - image.mean()) < 0.02, "as it was before it was normalised"
    figure = segmentations(samples, task)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    shown = {int(v) for sample in samples for one in sample.maps.values() for v in np.unique(one)} - {255}
    assert set(names) <= {*task.class_names, "not labelled"} | {n for n in names if n.startswith("and ")}
    assert len(names) == min(len(shown) + 1, 31) and len(figure.axes) == 16
    assert displayed(torch.zeros(3, 2, 2), None).shape == (2, 2, 3)


def test_colours_are_all_different() -> None:
    assert len(set(spread_colours(150))) == 150
    assert all(0 <= value <= 255 for colour in spread_colours(300) for value in colour)


def test_the_table_of_classes() -> None:
    before, after = {"a": 0.5, "b": None, "c": 1.0, "d": None}, {"a": 0.25, "b": 0.0, "c": None, "d": None}
    dense, pruned = ({"mean_iou": {"per_class": given}} for given in (before, after))
    lines = class_block(dense, pruned).splitlines()
    assert lines[2:] == ["| a | 50.00 | 25.00 | -25.00 points |", "| b | n/a (absent) | 0.00 |  |",
                         "| c | 100.00 | n/a (absent) |  |"]  # fmt: skip
    assert class_block({"accuracy": {"value": 1}}, {}) == ""


def test_a_run_of_mask2former(composed: Compose, cities: Path, tmp_path: Path) -> None:
    more = ("model=mask2former", "model.name=null", "model.image_size=[32,64]", "evals=[mean_iou,loss]")
    more = (*more, "prune.budget=macs", "prune.ratio=0.1")
    cfg = composed(*overrides(cities, "cityscapes", tmp_path / "storage", *more))
    training = {"_target_": "utils.training.Training", "epochs": 1, "learning_rate": 0.001}
    cfg.model = OmegaConf.merge(cfg.model, {"settings": SETTINGS | LEAST, "training": training})
    record = run(cfg, tmp_path / "out")
    assert record.status == "ok" and record.plan and record.plan.ratio_reached > 0.05
    assert 0 <= record.pruned["mean_iou"].value <= 1 and record.pictures  # type: ignore[operator]
    assert record.dense["loss"].value > 0  # type: ignore[operator]


def test_augmentation_that_moves_pixels_is_refused(composed: Compose, cities: Path, tmp_path: Path) -> None:
    more = ("recover=finetune", "recover.epochs=1", "recover.augment=rand-m9-mstd0.5-inc1")
    with pytest.raises(InputError, match="it would move pixels of data=cityscapes and not their labels"):
        run(config(composed, cities, "cityscapes", tmp_path / "storage", *more), tmp_path / "out")
