"""ADE20K and Cityscapes from their folders and from rows: what each pixel's label is, and what is refused."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data.pairs
from data.ade20k import NAMES, ade20k
from data.base import DataBundle, prepared
from data.cityscapes import cityscapes
from data.images import transform_of
from data.label_maps import label_table, read_label_map
from models.preprocessing import ImagePreprocessing
from tests.segmenters import FORM, SIZES, scene, write_ade20k, write_cityscapes
from utils.errors import InputError
from utils.hub import reachable
from utils.storage import Store

FEW: dict[str, Any] = {"batch_size": 2, "calibration_batches": 2, "calibration_batch_size": 2, "workers": 0}


def model(form: Any = FORM) -> Any:
    return SimpleNamespace(name="stand_in", preprocessing=form)


def ade(root: Path, form: Any = FORM, **changes: Any) -> DataBundle:
    return prepared(ade20k(root=str(root), **{**FEW, **changes}), model(form))


def city(root: Path, **changes: Any) -> DataBundle:
    return prepared(cityscapes(root=str(root), **{**FEW, **changes}), model())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_ade20k(tmp_path / "ade")


# --- what comes out


def test_ade20k_labels_are_reduced_and_of_their_own_size(root: Path) -> None:
    source = ade(root)
    batches = list(source.validation)
    assert [len(batch["inputs"]) for batch in batches] == [2, 2, 1]
    seen = 0
    for batch in batches:
        assert batch["inputs"].shape[1:] == (3, 32, 64) and batch["inputs"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64 and batch["labels"].shape[1:] == tuple(batch["sizes"].amax(dim=0))
        for labels, size in zip(batch["labels"], batch["sizes"].tolist(), strict=True):
            assert tuple(size) == SIZES[seen]
            raw = np.array(Image.open(root / f"annotations/validation/ADE_{seen:04}.png")).astype(int)
            expected = np.where(raw == 0, 255, raw - 1)
            assert np.array_equal(labels[: size[0], : size[1]].numpy(), expected)
            assert (labels[size[0] :] == 255).all() and (labels[:, size[1] :] == 255).all()
            seen += 1
    assert seen == 5 and set(np.unique(torch.cat([b["labels"].flatten() for b in batches]))) <= {0, 1, 2, 149, 255}
    assert (source.name, source.domain, source.train_samples, len(source.train)) == ("ade20k", "vision", 6, 3)
    assert source.task.misfit(torch.zeros(1, 7, 151 + 8 * 16)) is None, "masks are a quarter of the input"
    assert (NAMES[0], NAMES[12], NAMES[149], len(NAMES), len(set(NAMES))) == ("wall", "person", "flag", 150, 150)


def test_the_same_in_the_archives_own_folder(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root, tmp_path / "outer" / "ADEChallengeData2016")
    assert ade(tmp_path / "outer").fingerprints == ade(root).fingerprints


@pytest.mark.parametrize("ending", ["labelIds", "labelTrainIds"])
def test_cityscapes_labels_are_the_official_train_ids(tmp_path: Path, ending: str) -> None:
    source = city(write_cityscapes(tmp_path, ending=ending))
    raw = np.array(Image.open(tmp_path / f"gtFine/val/aachen/aachen_000000_000019_gtFine_{ending}.png")).astype(int)
    if ending == "labelIds":
        assert set(np.unique(raw)) <= {0, 7, 11, 26, 33}
        for value, label in {0: 255, 7: 0, 11: 2, 26: 13, 33: 18}.items():
            raw[raw == value] = label + 1000
        raw -= 1000
    first = next(iter(source.validation))
    assert np.array_equal(first["labels"][0].numpy(), raw) and source.task.misfit(torch.zeros(1, 19, 4, 4)) is None
    assert source.task.names[13] == "car" and source.task.colours[13] == (0, 0, 142)  # type: ignore[attr-defined]


def test_of_both_forms_the_data_sets_own_ids_are_read(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    plain = city(tmp_path)
    for path in tmp_path.glob("gtFine/*/*/*_labelIds.png"):
        Image.new("L", (64, 32), 3).save(str(path).replace("labelIds", "labelTrainIds"))
        (path.parent / path.name.replace("labelIds.png", "polygons.json")).write_text("{}")
        Image.new("RGB", (64, 32)).save(str(path).replace("labelIds", "color"))
    assert city(tmp_path).fingerprints == plain.fingerprints


def test_the_official_table_whole() -> None:
    from data.cityscapes import IDS, TRAIN_IDS

    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [int(IDS[value]) for value in trained] == list(range(19))
    assert all(IDS[value] == 255 for value in range(34) if value not in trained) and IDS[255] == 255
    assert all(IDS[value] == -1 for value in range(34, 255)) and TRAIN_IDS[19] == -1 and TRAIN_IDS[255] == 255


def test_images_are_scaled_whole_as_timm_would(root: Path) -> None:
    image = Image.open(root / "images/validation/ADE_0000.jpg").convert("RGB")
    squashed = ImagePreprocessing((3, 32, 64), FORM.mean, FORM.std, "bilinear", 1.0, "squash")
    torch.testing.assert_close(ade(root).example["inputs"][0], transform_of(squashed)(image))


def test_what_exif_says_of_orientation_is_left_out(root: Path) -> None:
    path, plain = root / "images/validation/ADE_0000.jpg", ade(root).example["inputs"]
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(path)
    image.save(path, quality=95, exif=exif)
    turned = ade(root)
    assert turned.example["inputs"].shape == plain.shape
    torch.testing.assert_close(turned.example["inputs"], plain, atol=0.3, rtol=0)


def test_training_and_calibration_labels_are_at_the_masks_size(root: Path) -> None:
    source = ade(root)
    source.train.set_epoch(1)
    first, again, other = list(source.train), list(source.train), None
    source.train.set_epoch(2)
    other = list(source.train)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in ("inputs", "labels"))
    assert not torch.equal(first[0]["inputs"], other[0]["inputs"])
    assert first[0]["labels"].shape == (2, 8, 16) and "sizes" not in first[0]
    assert [batch["labels"].shape for batch in source.calibration] == [(2, 8, 16)] * 2
    rest, held = source.train.divided(0.5, 0)  # type: ignore[attr-defined]
    assert (len(rest.pairs), len(held.pairs)) == (3, 3)


def test_augmentation_moves_image_and_label_together(tmp_path: Path) -> None:
    """Where a bright left half is class 1, the label follows the brightness however both are cut and mirrored."""
    root = write_ade20k(tmp_path)
    for number in range(6):
        labels = np.ones((40, 80), dtype=np.uint8)
        labels[:, :40] = 2
        Image.fromarray(labels).save(root / f"annotations/training/ADE_{number:04}.png")
        grey = np.where(labels == 2, 230, 20).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, -1)).save(root / f"images/training/ADE_{number:04}.jpg")
    source, sides = ade(root), set()
    for epoch in (1, 2, 3):
        source.train.set_epoch(epoch)
        for batch in source.train:
            bright = torch.nn.functional.avg_pool2d(batch["inputs"].mean(dim=1, keepdim=True), 4)[:, 0] > 0
            assert ((batch["labels"] == 1) == bright).float().mean() > 0.9
            sides |= {bool(one[0, 0]) for one in bright}
    assert sides == {True, False}, "some are mirrored"


def test_processes_make_the_same_batches(root: Path) -> None:
    alone, shared = ade(root), ade(root, workers=2)
    for one, other in zip([*alone.train, *alone.validation], [*shared.train, *shared.validation], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_calibration_is_drawn_by_the_seed(root: Path) -> None:
    first, again, other = ade(root), ade(root), ade(root, seed=1)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first.calibration, again.calibration, strict=True))
    assert first.fingerprints == again.fingerprints
    assert other.fingerprints["calibration"] != first.fingerprints["calibration"]
    assert other.fingerprints["validation"] == first.fingerprints["validation"]


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("folder", ["images", "annotations"])
def test_fingerprints_follow_contents_of_equal_size(tmp_path: Path, split: str, folder: str) -> None:
    root = write_ade20k(tmp_path)
    ending = "jpg" if folder == "images" else "png"
    path = root / folder / split / f"ADE_0000.{ending}"
    if ending == "jpg":  # kept as a PNG: its size can stay while a pixel changes
        image = np.array(Image.open(path))
        path.unlink()
        path = path.with_suffix(".png")
    else:
        image = np.array(Image.open(path))
    Image.fromarray(image).save(path, compress_level=0)
    before, size = ade(root).fingerprints, path.stat().st_size
    image[0, 0] = 3 - image[0, 0] if ending == "png" and image[0, 0] in (1, 2) else 1
    Image.fromarray(image).save(path, compress_level=0)
    after = ade(root).fingerprints
    part, others = ("train", "validation") if split == "training" else ("validation", "train")
    assert path.stat().st_size == size and after[part] != before[part] and after[others] == before[others]


def test_fewer_samples(root: Path) -> None:
    source = ade(root, train_samples=4, validation_samples=3)
    assert source.train_samples == 4 and sum(len(b["inputs"]) for b in source.validation) == 3
    assert any("validated on 3 of 5 images" in note for note in source.notes)
    with pytest.raises(
        InputError, match=r"data.validation_samples=6: must be at most the 5 pairs of ade20k validation"
    ):
        ade(root, validation_samples=6)
    with pytest.raises(InputError, match=r"data.train_samples=7: must be at most the 6"):
        ade(root, train_samples=7)
    with pytest.raises(InputError, match="calibration_batches=2, .*4 samples; must be between 1 and the 3 training"):
        ade(root, train_samples=3)


def test_notes_name_classes_without_a_validation_label(root: Path) -> None:
    (note,) = (note for note in ade(root).notes if "no validation label" in note)
    assert note.startswith("146 of the 150 classes are in no validation label: floor, tree, ceiling") and "more" in note


def test_pairs_are_looked_at_once_and_read_only_when_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    whole = data.pairs.read_pair
    for place in ("data.pairs.read_pair", "data.pair_batches.read_pair"):
        monkeypatch.setattr(place, lambda pairs, index: reads.append(pairs.name(index)) or whole(pairs, index))
    store, source = Store(tmp_path / "storage"), ade20k(root=str(root), **FEW)
    prepared(source, model(), store)
    assert len(reads) == 11 + 4 + 1, "all once to look, then calibration and the example"
    reads.clear()
    bundle = prepared(source, model(), store)
    assert len(reads) == 4 + 1
    next(iter(bundle.validation))
    assert len(reads) == 7, "a batch reads its own"


# --- label maps


def grey(values: list[list[int]], kind: str) -> Image.Image:
    array = np.array(values)
    if kind == "16 bit":
        return Image.fromarray(array.astype(np.uint16))
    if kind == "32 bit":
        return Image.fromarray(array.astype(np.int32))
    image = Image.fromarray(array.astype(np.uint8))
    if kind == "palette":
        image = Image.fromarray(array.astype(np.uint8), "P")
        image.putpalette([7 * (n % 30) for n in range(768)])
    return image


@pytest.mark.parametrize("kind", ["8 bit", "16 bit", "32 bit", "palette"])
def test_every_kind_of_label_map_is_read_by_its_numbers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("map.tif" if kind == "32 bit" else "map.png")
    grey([[0, 1, 3], [2, 3, 255]], kind).save(path)
    table = label_table({1: 0, 2: 1, 3: 2}, ignored=(0,))
    found = read_label_map(Image.open(path), table, "map")
    assert found.dtype == np.uint8 and found.tolist() == [[255, 0, 2], [1, 2, 255]]


@pytest.mark.parametrize(("bits", "values"), [(1, [0, 1, 1, 0]), (2, [0, 1, 2, 3]), (4, [0, 3, 2, 1])])
def test_grey_pngs_of_few_bits_are_not_stretched(bits: int, values: list[int]) -> None:
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = 0
    for value in values:
        row = row << bits | value
    row <<= -4 * bits % 8
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row.to_bytes(-(-4 * bits // 8)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    table = label_table({value: value for value in range(4)}, ignored=())
    assert read_label_map(Image.open(io.BytesIO(png)), table, "map").tolist() == [values]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (4, 4)), "a PNG of mode RGB; a label map must be a grey or palette PNG"),
        (Image.new("LA", (4, 4)), "mode LA"),
        (
            grey([[0, 300]], "16 bit"),
            r"pixel \(row 0, column 1\) has the label 300, one of 1 wrong ones; .* 0 to 3 or 255",
        ),
        (grey([[0, 1], [4, 9]], "8 bit"), r"pixel \(row 1, column 0\) has the label 4, one of 2 wrong ones"),
    ],
)
def test_what_holds_no_labels_is_refused(image: Image.Image, words: str) -> None:
    kept = io.BytesIO()
    image.save(kept, "PNG")
    with pytest.raises(InputError, match=words):
        read_label_map(Image.open(kept), label_table({1: 0, 2: 1, 3: 2}, ignored=(0,)), "map")


# --- bad input


def overwrite(path: Path, content: bytes | Image.Image) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)


LABELS, IMAGES = "annotations/training/ADE_0001.png", "images/training/ADE_0001.jpg"
JUDGED = "annotations/validation/ADE_0004.png"


def flat(size: tuple[int, int], value: int) -> Image.Image:
    return Image.new("L", size, value)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a label out of range": (lambda r: overwrite(r / LABELS, flat((70, 36), 151)), "ADE_0001.png: pixel .*151"),
    "another, validation": (lambda r: overwrite(r / JUDGED, flat((60, 44), 200)), "ADE_0004.png: pixel .*200"),
    "an image without a label": (lambda r: (r / LABELS).unlink(), "images without their label map: .*ADE_0001.jpg"),
    "a label without an image": (lambda r: (r / IMAGES).unlink(), "label maps without their image: .*ADE_0001.png"),
    "two of one name": (lambda r: flat((9, 9), 0).save((r / IMAGES).with_suffix(".png")), "have the same name"),
    "another size": (lambda r: overwrite(r / LABELS, flat((70, 37), 1)), "ADE_0001.png: is 70x37 .* is 70x36"),
    "no image": (lambda r: overwrite(r / IMAGES, b"no image"), "ADE_0001.jpg: can't be read: UnidentifiedImageError"),
    "half an image": (lambda r: overwrite(r / IMAGES, (r / IMAGES).read_bytes()[:900]), "ADE_0001.jpg: can't be read"),
    "half a label": (lambda r: overwrite(r / LABELS, (r / LABELS).read_bytes()[:60]), "ADE_0001.png: can't be read"),
    "an empty label file": (lambda r: overwrite(r / LABELS, b""), "ADE_0001.png: can't be read"),
    "labels in colour": (lambda r: overwrite(r / LABELS, Image.new("RGB", (70, 36))), "ADE_0001.png: .* mode RGB"),
    "an empty split": (lambda r: [p.unlink() for p in r.glob("*/validation/*")], "validation.*: holds no image"),
    "a split missing": (lambda r: shutil.rmtree(r / "images/validation"), "has no folder images/validation; must hold"),
    "another layout": (lambda r: (r / "images").rename(r / "pictures"), "has no folder images/training; must hold"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_named_before_any_work(root: Path, what: str, workers: int) -> None:
    change, words = BAD[what]
    ade(root, workers=workers)
    change(root)
    with pytest.raises(InputError, match=words) as caught:
        ade(root, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_later_is_named_too(root: Path) -> None:
    for workers in (0, 2):
        source = ade(root, workers=workers)
        (root / "images/validation/ADE_0003.jpg").write_bytes(b"gone")
        with pytest.raises(InputError, match="ADE_0003.jpg: can't be read: UnidentifiedImageError") as caught:
            list(source.validation)
        assert "Traceback" not in str(caught.value)
        shutil.rmtree(root)
        write_ade20k(root)


@pytest.mark.parametrize("change", ["gtFine", "leftImg8bit/val", "label", "image"])
def test_bad_cityscapes(tmp_path: Path, change: str) -> None:
    write_cityscapes(tmp_path)
    label = tmp_path / "gtFine/val/bochum/bochum_000001_000019_gtFine_labelIds.png"
    if change == "label":
        Image.new("L", (64, 32), 34).save(label)
        words = "bochum_000001_000019_gtFine_labelIds.png: pixel .* has the label 34, .* must be 0 to 33 or 255"
    elif change == "image":
        label.rename(label.with_name("bochum_000009_000019_gtFine_labelIds.png"))
        words = "images without their label map: leftImg8bit/val/bochum/bochum_000001_000019_leftImg8bit.png"
    else:
        shutil.rmtree(tmp_path / change)
        words = f"has no folder {change}.*; must hold leftImg8bit/train, leftImg8bit/val, gtFine/train, gtFine/val"
    with pytest.raises(InputError, match=words):
        city(tmp_path)


@pytest.mark.parametrize(
    ("form", "words"), [(None, "model=stand_in has none"), (ImagePreprocessing((1, 8, 8), (0.5,), (0.5,)), "takes 1")]
)
def test_a_model_without_transforms_for_colour_is_refused(root: Path, form: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ade(root, form)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="has no folder images/training"):
        ade(tmp_path / "file")


# --- rows of a hub data set, from a folder in its format


def write_rows(
    folder: Path, broken: bool = False, column: str = "annotation", splits: Any = ("train", "validation")
) -> str:
    from datasets import Dataset, Features
    from datasets import Image as Encoded

    for split in splits:
        rows: dict[str, list[Any]] = {"image": [], column: []}
        for number in range(5):
            image, labels = scene(number, [0, 1, 2], SIZES[number])
            for name, picture, kind in (("image", image, "JPEG"), (column, Image.fromarray(labels), "PNG")):
                kept = io.BytesIO()
                picture.save(kept, kind)
                content = b"no image" if broken and number == 3 and name == column else kept.getvalue()
                rows[name].append({"bytes": content, "path": None})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict(rows, Features({"image": Encoded(), column: Encoded()}))
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def of_hub(name: str, **changes: Any) -> DataBundle:
    source = ade20k(hub_name=name, hub_config=None, hub_revision=None, **{**FEW, **changes})
    return prepared(source, model())


def test_rows_of_the_hub_are_the_same_pairs(tmp_path: Path) -> None:
    source = of_hub(write_rows(tmp_path))
    batch = next(iter(source.validation))
    expected = scene(0, [0, 1, 2], SIZES[0])[1].astype(int)
    height, width = SIZES[0]
    assert np.array_equal(batch["labels"][0, :height, :width].numpy(), np.where(expected == 0, 255, expected - 1))
    assert source.train_samples == 5 and of_hub(str(tmp_path)).fingerprints == source.fingerprints
    assert of_hub(str(tmp_path), validation_samples=2).fingerprints["validation"] != source.fingerprints["validation"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"broken": True}, "row 3, annotation: can't be read"),
        ({"column": "colours"}, "has the columns image, colours; needs image and one of annotation"),
        ({"splits": ("train", "test")}, r"its splits are train \(5\), test \(5\); needs validation"),
    ],
)
def test_bad_rows(tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        of_hub(write_rows(tmp_path, **settings))


@pytest.mark.parametrize("source", [ade20k, cityscapes])
def test_without_a_hub_the_two_ways_are_named(source: Any) -> None:
    if reachable():
        pytest.skip("the hub answers")
    with pytest.raises(InputError, match="is not on this machine .* give data.root=<folder with"):
        source().prepare(model())
