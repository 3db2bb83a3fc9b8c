"""ImageNet from folders, CIFAR from its files: which image is which class, and what happens to broken ones."""

import io
import logging
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo  # type: ignore[attr-defined]

import data.cifar
import data.imagenet
from data.base import Batch, DataBundle, prepared
from data.cifar import augmented, cifar
from data.cifar_files import read_records
from data.imagenet import class_folders, imagenet
from data.images import Broken, ImageBatches, transform_of
from models.preprocessing import ImagePreprocessing, TextPreprocessing
from models.toy_encoder import toy_encoder
from utils import hub
from utils.errors import InputError

REAL = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
WNIDS = ImageNetInfo().label_names()
SMALL = ImagePreprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
SIZES: dict[str, Any] = {"batch_size": 4, "calibration_batches": 2, "calibration_batch_size": 3, "workers": 0}


def model(preprocessing: Any = SMALL) -> Any:
    return SimpleNamespace(name="stand_in", preprocessing=preprocessing)


def write_images(folder: Path, count: int, first: int = 0, suffix: str = "JPEG") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.{suffix}" for number in range(first, first + count)]
    for number, path in enumerate(paths, start=first):
        pixels = np.random.default_rng([number, *folder.name.encode()]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three of the thousand classes, out of order; 12 images to train on and 9 to validate on."""
    for label in (999, 7, 300):
        write_images(tmp_path / "train" / WNIDS[label], 4)
        write_images(tmp_path / "val" / WNIDS[label], 3)
    return tmp_path


def bundle(root: Path, preprocessing: Any = SMALL, **changes: Any) -> DataBundle:
    return prepared(imagenet(root=str(root), **{**SIZES, **changes}), model(preprocessing))


def joined(batches: Any) -> Batch:
    parts = list(batches)
    return {name: torch.cat([part[name] for part in parts]) for name in ("inputs", "labels")}


def epoch_of(source: DataBundle, epoch: int) -> Batch:
    source.train.set_epoch(epoch)
    return joined(source.train)


def equal(first: Batch, other: Batch) -> bool:
    return all(torch.equal(first[name], other[name]) for name in ("inputs", "labels"))


# --- ImageNet from folders


def test_classes_are_those_of_the_official_list_whatever_folders_there_are(root: Path) -> None:
    source = bundle(root)
    labels = torch.cat([batch["labels"] for batch in source.validation])
    assert labels.tolist() == [7] * 3 + [300] * 3 + [999] * 3 and labels.dtype == torch.int64
    assert source.task.misfit(torch.zeros(2, 1000)) is None and source.task.misfit(torch.zeros(2, 3))
    assert (source.train_samples, len(source.train), source.name, source.domain) == (12, 3, "imagenet", "vision")
    assert source.example["inputs"].shape == (1, 3, 16, 16) and source.notes == []


def test_images_come_as_the_models_own_transform_makes_them(root: Path) -> None:
    path = root / "val" / WNIDS[7] / "0000.JPEG"
    expected = transform_of(SMALL)(Image.open(path).convert("RGB"))
    assert torch.equal(bundle(root).example["inputs"][0], expected)
    assert expected.shape == (3, 16, 16) and expected.min() >= -2 and expected.max() <= 2
    assert joined(bundle(root, ImagePreprocessing((3, 8, 12), (0,) * 3, (1,) * 3)).train)["inputs"].shape[1:] == (
        3,
        8,
        12,
    )


def test_extensions_hidden_entries_and_the_longer_name(tmp_path: Path) -> None:
    folder = tmp_path / "validation" / WNIDS[3]
    for suffix in ("JPG", "png", "WebP", "bmp", "jpeg"):
        write_images(folder, 1, suffix=suffix)
    (folder / "._0000.JPG").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (tmp_path / "validation" / ".cache").mkdir()
    (tmp_path / "validation" / "list.csv").write_text("a file beside the folders")
    assert len(joined(bundle(tmp_path, calibration_batches=1).validation)["labels"]) == 5


def test_a_folder_that_is_no_class_is_named(root: Path) -> None:
    write_images(root / "val" / "tench", 1)
    with pytest.raises(InputError, match=r"data.root: .*tench: must be named by one of ImageNet's 1,000 WordNet ids"):
        bundle(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: None, "must hold val/<WordNet id>"),
        (lambda r: (r / "val").mkdir(), "val: holds no images"),
        (lambda r: (r / "val" / WNIDS[0]).mkdir(parents=True), "val: holds no images"),
        (lambda r: write_images(r / "val", 3), "val: holds no images"),
        (lambda r: ((r / "train").mkdir(), write_images(r / "val" / WNIDS[0], 9)), "train: holds no images"),
    ],
    ids=["no val", "empty val", "empty class", "no class folders", "empty train"],
)
def test_a_root_without_images_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=f"data.root.*{message}"):
        bundle(tmp_path)


def test_arguments_that_ask_for_too_much_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="calibration_batches=5, .*15 samples; must be between 1 and the 12 training"):
        bundle(root, calibration_batches=5)
    with pytest.raises(InputError, match="calibration_batches=0, .*0 samples; must be between 1 and the 12 training"):
        bundle(root, calibration_batches=0)
    with pytest.raises(InputError, match="data.validation_samples=10: must be at most the 9 validation images"):
        bundle(root, validation_samples=10)
    with pytest.raises(InputError, match="workers=-1 must be at least 0"):
        imagenet(workers=-1)


@pytest.mark.parametrize("other", [None, TextPreprocessing(None, 8)])
def test_a_model_without_transforms_is_refused(root: Path, other: Any) -> None:
    with pytest.raises(InputError, match="data=imagenet needs a vision model .*; model=stand_in has none"):
        bundle(root, other)
    with pytest.raises(InputError, match="data=imagenet has 3 channels; model=stand_in takes 1"):
        bundle(root, ImagePreprocessing((1, 16, 16), (0.5,), (0.5,)))


def test_calibration_is_drawn_from_train_without_repeats(root: Path) -> None:
    source = bundle(root, calibration_batches=4)
    assert [batch["inputs"].shape for batch in source.calibration] == [(3, 3, 16, 16)] * 4
    drawn, plain = joined(source.calibration), transform_of(SMALL)
    train = class_folders(root / "train")
    expected = {plain(train.image(i).convert("RGB")).numpy().tobytes(): int(train.labels[i]) for i in range(12)}
    found = {image.numpy().tobytes(): int(label) for image, label in zip(drawn["inputs"], drawn["labels"], strict=True)}
    assert found == expected, "12 of 12, plain, each with its own label"
    assert equal(joined(bundle(root).calibration), joined(bundle(root, workers=2).calibration))
    assert not equal(joined(bundle(root).calibration), joined(bundle(root, seed=1).calibration))


def test_without_train_calibration_comes_from_val_and_says_so(root: Path) -> None:
    (root / "train").rename(root / "elsewhere")
    source = bundle(root, validation_samples=2)
    assert len(source.train) == source.train_samples == len(list(source.train)) == 0
    assert len(source.calibration) == 2 and any("no train/" in note for note in source.notes)
    assert len(joined(source.validation)["labels"]) == 2, "more to calibrate on than to validate on"


def test_a_validation_sample_is_seeded_ordered_and_noted(root: Path) -> None:
    everything, drawn = joined(bundle(root).validation), bundle(root, validation_samples=5)
    batch = joined(drawn.validation)
    rows = [
        i for i, image in enumerate(everything["inputs"]) if any(torch.equal(image, one) for one in batch["inputs"])
    ]
    assert len(rows) == 5 and torch.equal(everything["inputs"][rows], batch["inputs"])
    assert any("5 of 9" in note for note in drawn.notes)
    assert equal(batch, joined(bundle(root, validation_samples=5).validation))
    assert not equal(batch, joined(bundle(root, validation_samples=5, seed=3).validation))


# --- order and augmentation


def test_workers_change_nothing(root: Path) -> None:
    alone, spread = bundle(root), bundle(root, workers=2)
    assert equal(joined(alone.validation), joined(spread.validation))
    for epoch in (1, 2):
        assert equal(epoch_of(alone, epoch), epoch_of(spread, epoch))
    assert alone.fingerprints == spread.fingerprints


def test_an_epoch_depends_on_seed_and_number_alone(root: Path) -> None:
    source = bundle(root)
    first, second = epoch_of(source, 1), epoch_of(source, 2)
    random.seed(5)
    torch.rand(3)
    next(iter(source.train))  # a pass that was given up
    assert equal(first, epoch_of(source, 1)) and equal(second, epoch_of(bundle(root), 2))
    assert not torch.equal(first["labels"], second["labels"])
    assert not equal(first, epoch_of(bundle(root, seed=1), 1))
    images = {image.numpy().tobytes() for batch in (first, second) for image in batch["inputs"]}
    assert len(images) == 24, "augmented anew each time"


def test_a_pass_leaves_the_random_state_alone(root: Path) -> None:
    source = bundle(root)
    before = random.getstate(), torch.get_rng_state()
    epoch_of(source, 1)
    joined(source.validation)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_validation_keeps_its_order(root: Path) -> None:
    source = bundle(root)
    assert equal(joined(source.validation), joined(source.validation))
    assert [len(batch["labels"]) for batch in source.validation] == [4, 4, 1]


def test_fingerprints_follow_what_they_stand_for(root: Path) -> None:
    base = bundle(root).fingerprints

    def changed(**settings: Any) -> set[str]:
        return {part for part, value in bundle(root, **settings).fingerprints.items() if value != base[part]}

    assert changed() == set()
    assert changed(calibration_batch_size=2) == {"calibration"} == changed(calibration_batches=1)
    assert changed(batch_size=5) == {"train", "validation"} and changed(seed=1) == {"train", "calibration"}
    assert changed(preprocessing=ImagePreprocessing((3, 16, 16), (0.4,) * 3, (0.25,) * 3)) == set(base)
    write_images(root / "val" / WNIDS[7], 1, first=50)
    assert changed() == {"validation"}


# --- broken images


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A hundred and fifty images to train on, and as many to validate on."""
    for split in ("train", "val"):
        write_images(tmp_path / split / WNIDS[1], 150)
    return tmp_path


def skipped_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_skipped_and_reported_once(
    many: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, workers: int
) -> None:
    path = many / "val" / WNIDS[1] / "0070.JPEG"
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    source = bundle(many, workers=workers, batch_size=20)
    assert isinstance(source.validation, ImageBatches) and source.validation.skipped == 0
    sizes = [len(batch["labels"]) for batch in source.validation]
    assert sizes == [20, 20, 20, 19, 20, 20, 20, 10] == [len(batch["labels"]) for batch in source.validation]
    assert source.validation.skipped == 1
    [note] = [note for note in source.notes if "can't be read" in note]
    assert note.startswith("1 of the ") and str(path) in note
    [message] = skipped_of(caplog)
    assert message.startswith(str(path)) and caplog.records[-1].levelno == logging.WARNING


def test_a_link_that_leads_nowhere_is_a_broken_image(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    (many / "val" / WNIDS[1] / "9999.JPEG").symlink_to(many / "gone.JPEG")
    assert len(joined(bundle(many).validation)["labels"]) == 150
    assert "FileNotFoundError" in skipped_of(caplog)[0]


def test_a_batch_of_broken_images_yields_nothing_and_an_example_is_found(many: Path) -> None:
    (many / "val" / WNIDS[1] / "0000.JPEG").write_bytes(b"")
    source = bundle(many, batch_size=1)
    assert source.example["inputs"].shape[0] == 1 and len(list(source.validation)) == 149


def test_more_than_one_percent_broken_is_an_error(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (20, 30, 40):
        (many / "val" / WNIDS[1] / f"{number:04}.JPEG").write_bytes(b"")
    source = bundle(many)
    for _ in range(2):
        with pytest.raises(InputError, match=r"0020.JPEG: .*at least 2 of the 150 validation images .* at most 1%"):
            list(source.validation)
    assert len(skipped_of(caplog)) == 2


def test_a_broken_image_in_the_calibration_sample_is_replaced(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"calibration_batches": 49, "calibration_batch_size": 3}
    before = joined(bundle(many, **sizes).calibration)["inputs"]
    folder, plain = class_folders(many / "train"), transform_of(SMALL)
    images = [plain(folder.image(i).convert("RGB")) for i in range(150)]
    victim = next(i for i, image in enumerate(images) if torch.equal(image, before[100]))
    Path(folder.name(victim)).write_bytes(b"")
    source = bundle(many, **sizes)
    after = joined(source.calibration)["inputs"]
    assert [len(batch["labels"]) for batch in source.calibration] == [3] * 49
    assert torch.equal(after[:-1], torch.cat([before[:100], before[101:]]))
    assert len({image.numpy().tobytes() for image in after}) == 147 and len(skipped_of(caplog)) == 1
    assert torch.equal(after, joined(bundle(many, **sizes).calibration)["inputs"])
    joined(source.train)
    assert isinstance(source.train, ImageBatches) and source.train.skipped == 1
    assert len(skipped_of(caplog)) == 2, "once for each of the two bundles"
    with pytest.raises(InputError, match="150 samples; must be at most the 149 readable images"):
        bundle(many, calibration_batches=50)


def test_the_limit_counts_an_image_once() -> None:
    broken = Broken("validation", 100)
    for _ in range(3):
        broken.add([("a", "why")])
    with pytest.raises(InputError, match="a: why; at least 2 of the 100"):
        broken.add([("b", "why")])


# --- the hub


@pytest.mark.parametrize("what", ["imagenet", "cifar10", "cifar100"])
def test_without_a_network_there_is_one_message_at_once(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # as where the network is merely gone
    monkeypatch.setattr(hub, "reachable", lambda: False)
    source = imagenet() if what == "imagenet" else cifar(classes=int(what.removeprefix("cifar")))  # type: ignore[arg-type]
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"data={what} .*: is not on this machine and .* give data.root=<folder"):
        source.prepare(model())
    assert time.perf_counter() - start < 15
    assert datasets.config.HF_HUB_OFFLINE is False


def test_an_unusual_error_of_the_hub_is_one_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str) -> None:
        raise RuntimeError(f"{name} is odd\nand long")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="refuses it: RuntimeError: ILSVRC/imagenet-1k is odd; or give data.root="):
        imagenet().prepare(model())


def hub_split(count: int, labels: dict[str, list[int]], broken: tuple[int, ...] = (), column: str = "image") -> Any:
    from datasets import Dataset, Features, Value
    from datasets import Image as EncodedImage

    def encoded(number: int) -> bytes:
        kept = io.BytesIO()
        Image.new("RGB", (32, 32), (number, 0, 255 - number)).save(kept, "PNG")
        return b"" if number in broken else kept.getvalue()

    rows = {column: [{"bytes": encoded(n), "path": None} for n in range(count)], **labels}
    return Dataset.from_dict(rows, Features({column: EncodedImage(), **{name: Value("int64") for name in labels}}))


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_of_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    splits = {
        "train": hub_split(12, {"label": [*range(12)]}),
        "validation": hub_split(120, {"label": [*range(500, 620)]}, (5,)),
    }
    monkeypatch.setattr(data.imagenet, "hub_splits", lambda *_: splits)
    source = imagenet(**{**SIZES, "workers": workers}).prepare(model())
    batch = joined(source.validation)
    assert batch["labels"].tolist() == [n for n in range(500, 620) if n != 505]
    assert torch.allclose(batch["inputs"][-1, 0], torch.tensor((119 / 255 - 0.5) / 0.25))
    assert skipped_of(caplog)[0].startswith("ILSVRC/imagenet-1k validation row 5:") and source.train_samples == 12


@pytest.mark.parametrize(("classes", "column"), [(10, "label"), (100, "fine_label")])
def test_cifar_of_the_hub(monkeypatch: pytest.MonkeyPatch, classes: Any, column: str) -> None:
    split = hub_split(9, {column: [*range(9)], "other": [0] * 9}, column="img")
    monkeypatch.setattr(data.cifar, "hub_splits", lambda *_: {"train": split, "test": split})
    batch = joined(cifar(classes=classes, **SIZES).prepare(model(None)).validation)
    assert batch["labels"].tolist() == list(range(9))
    assert torch.allclose(batch["inputs"][3, :, 0, 0], torch.tensor([3, 0, 252]) / 127.5 - 1)


# --- CIFAR from files


def record(label: tuple[int, ...], red: int, green: int, blue: int, corner: int = 0) -> bytes:
    """One image of a single colour, its second pixel of the first row set to `corner` in red."""
    plane = bytearray([red] * 1024)
    plane[1] = corner
    return bytes([*label]) + bytes(plane) + bytes([green] * 1024) + bytes([blue] * 1024)


def write_binary(folder: Path, classes: int, train: int = 8, test: int = 4) -> Path:
    names = ("data_batch_1.bin", "test_batch.bin") if classes == 10 else ("train.bin", "test.bin")
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(names, (train, test), strict=True):
        labels = [(n % 10,) if classes == 10 else (1, 90 + n % 10) for n in range(count)]
        (folder / name).write_bytes(b"".join(record(label, n, 2, 3, 9) for n, label in enumerate(labels)))
    return folder


def cifar_bundle(root: Path, preprocessing: Any = None, **changes: Any) -> DataBundle:
    return prepared(cifar(root=str(root), **{**SIZES, **changes}), model(preprocessing))


@pytest.mark.parametrize(("classes", "folder"), [(10, "cifar-10-batches-bin"), (100, "cifar-100-binary")])
def test_binary_records_are_read_as_they_were_written(tmp_path: Path, classes: Any, folder: str) -> None:
    inner = write_binary(tmp_path / folder, classes)
    for root in (tmp_path, inner):
        source = cifar_bundle(root, classes=classes)
        batch = joined(source.validation)
        assert batch["labels"].tolist() == [n + (90 if classes == 100 else 0) for n in range(4)]
        assert torch.allclose(batch["inputs"][3, :, 0, :3], torch.tensor([[3, 9, 3], [2] * 3, [3] * 3]) / 127.5 - 1)
        assert batch["inputs"].shape == (4, 3, 32, 32) and batch["inputs"].dtype == torch.float32
        assert (source.name, source.train_samples) == (f"cifar{classes}", 8)
        assert source.task.misfit(torch.zeros(1, classes)) is None
    assert source.calibration[0]["inputs"].shape == (3, 3, 32, 32) == (3, *source.example["inputs"].shape[1:])


def test_training_files_are_read_in_order(tmp_path: Path) -> None:
    write_binary(tmp_path, 10)
    (tmp_path / "data_batch_3.bin").write_bytes(record((5,), 200, 200, 200))
    source = cifar_bundle(tmp_path)
    assert source.train_samples == 9
    assert joined(source.train)["labels"].sort().values.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_damaged_binary_files_are_refused(tmp_path: Path) -> None:
    folder = write_binary(tmp_path, 10)
    whole = (folder / "data_batch_1.bin").read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        (folder / "data_batch_1.bin").write_bytes(content)
        with pytest.raises(InputError, match=f"data_batch_1.bin: has {len(content)} bytes; must be a multiple of 3073"):
            cifar_bundle(tmp_path)
    (folder / "data_batch_1.bin").write_bytes(record((10,), 0, 0, 0))
    with pytest.raises(InputError, match="data_batch_1.bin: has labels from 10 to 10; must be below 10"):
        cifar_bundle(tmp_path)
    (folder / "data_batch_1.bin").unlink()
    with pytest.raises(InputError, match="has no training files; must hold data_batch_"):
        cifar_bundle(tmp_path)
    with pytest.raises(InputError, match="data.root=.*: holds no CIFAR-100; must be or hold cifar-100-binary"):
        cifar_bundle(tmp_path, classes=100)


def test_cifar_goes_through_the_models_transforms(tmp_path: Path) -> None:
    write_binary(tmp_path, 10)
    pixels, _ = read_records(tmp_path / "test_batch.bin", 10)
    small = ImagePreprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3, crop_pct=0.875)
    batch = joined(cifar_bundle(tmp_path, small).validation)
    assert torch.equal(batch["inputs"], pixels.float() / 255), "neither resized nor cropped"
    source = cifar_bundle(tmp_path, ImagePreprocessing((3, 48, 48), (0.5,) * 3, (0.5,) * 3))
    assert joined(source.validation)["inputs"].shape == (4, 3, 48, 48) == (4, *source.example["inputs"].shape[1:])
    assert joined(source.train)["inputs"].shape == (8, 3, 48, 48) and equal(epoch_of(source, 2), epoch_of(source, 2))
    with pytest.raises(InputError, match="data=cifar10 needs a vision model"):
        cifar_bundle(tmp_path, TextPreprocessing(None, 8))


def test_plain_training_images_move_with_all_their_channels() -> None:
    pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, 10, 12] = 255
    images = augmented(pixels, torch.Generator().manual_seed(0), reach=2)
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    places = images[:, 0].flatten(1).argmax(dim=1)
    assert set((places // 32).tolist()) == set(range(8, 13))
    assert set((places % 32).tolist()) == set(range(10, 15)) | set(range(17, 22)), "moved, and half of them mirrored"
    assert images.max() == 1 and images.min() == -1


def test_the_toy_encoder_takes_plain_cifar(tmp_path: Path) -> None:
    write_binary(tmp_path, 10)
    toy = toy_encoder(classes=10, image_size=32, channels=3, patch_size=4, width=8, heads=2, neurons=8, depth=1)
    source = prepared(cifar(root=str(tmp_path), **SIZES), toy)
    assert toy.logits(next(iter(source.train))).shape == (4, 10)
    first = epoch_of(source, 1)
    assert equal(first, epoch_of(source, 1)) and not equal(first, epoch_of(source, 2))


# --- CIFAR's pickles


class Malicious:
    """Runs a command when unpickled, if the reader lets it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def write_pickles(folder: Path, classes: int, protocol: int = 2, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(6 * 3072).reshape(6, 3072).astype(np.uint8)
    key, names = (b"labels", ("data_batch_1", "test_batch")) if classes == 10 else (b"fine_labels", ("train", "test"))
    content = {b"data": pixels, key: [4, 3, 2, 1, 0, classes - 1], b"filenames": [b"a.png"] * 6, b"batch_label": b""}
    content |= {name.encode(): value for name, value in changes.items()}
    for name in names:
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize(("classes", "name"), [(10, "cifar-10-batches-py"), (100, "cifar-100-python")])
def test_pickles_are_read_only_when_allowed(tmp_path: Path, classes: Any, name: str) -> None:
    folder = write_pickles(tmp_path / name, classes)
    for root in (tmp_path, folder):
        with pytest.raises(InputError, match="would have to be unpickled; allow that by data.allow_pickle=true, or"):
            cifar_bundle(root, classes=classes)
        source = cifar_bundle(root, classes=classes, allow_pickle=True)
        batch = joined(source.validation)
        assert batch["labels"].tolist() == [4, 3, 2, 1, 0, classes - 1]
        expected = torch.arange(6 * 3072).to(torch.uint8).view(6, 3, 32, 32)
        assert torch.equal(batch["inputs"], expected.float() / 127.5 - 1)
        assert any("unpickled" in note for note in source.notes)
    write_binary(tmp_path / data.cifar.BINARY[classes].folder, classes)
    assert cifar_bundle(tmp_path, classes=classes).notes == [], "the binary version goes first"


def test_a_pickle_as_python_2_wrote_it(tmp_path: Path) -> None:
    """Byte strings where Python 3 has text, and numpy's old module names: the form of the real archive."""
    pixels = bytes(range(256)) * 12
    raw = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little") + pixels + b"tbU\x06labels]K\x07au."
    )  # fmt: skip
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(raw)
    source = cifar_bundle(tmp_path, allow_pickle=True, calibration_batches=1, calibration_batch_size=1)
    assert joined(source.validation)["labels"].tolist() == [7]
    assert torch.equal(source.example["inputs"].flatten(), torch.tensor([*pixels]) / 127.5 - 1)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "function", [os.system, eval, getattr, np.load, np.fromfile, __import__], ids=lambda f: f.__name__
)
def test_a_malicious_pickle_does_nothing(tmp_path: Path, function: Callable[..., Any], protocol: int) -> None:
    evil = Malicious(function, f"touch {tmp_path / 'hacked'}")
    write_pickles(tmp_path, 10, protocol, extra=evil)
    with pytest.raises(InputError, match=r"data.root: .*data_batch_1: .*asks for .*; must hold plain values"):
        cifar_bundle(tmp_path, allow_pickle=True)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((6, 3072))}, r"its data must be \(images, 3072\) uint8"),
        ({"data": np.zeros((5, 3072), dtype=np.uint8)}, "its data must be"),
        ({"data": b"none"}, "its data must be"),
        ({"labels": [0, 1, 2, 3, 4, 10]}, "has labels from 0 to 10; must be below 10"),
        ({"labels": "text"}, "can't be read as a file of CIFAR-10"),
    ],
)
def test_odd_pickles_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_pickles(tmp_path, 10, **changes)
    with pytest.raises(InputError, match=f"data_batch_1: .*{message}|data_batch_1: {message}"):
        cifar_bundle(tmp_path, allow_pickle=True)
    (tmp_path / "data_batch_1").write_bytes((tmp_path / "test_batch").read_bytes()[:99])
    with pytest.raises(InputError, match="data_batch_1: can't be read as a file of CIFAR-10"):
        cifar_bundle(tmp_path, allow_pickle=True)


# --- real data


@pytest.mark.skipif(not (REAL / "imagenet").is_dir(), reason="no imagenet/ under PARE_DATA")
def test_the_real_imagenet_sample() -> None:
    real = ImagePreprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    source = bundle(REAL / "imagenet", real, workers=2, batch_size=64, calibration_batches=2, calibration_batch_size=32)
    labels = joined(source.validation)["labels"]
    assert (len(labels), len(labels.unique()), source.train_samples) == (900, 596, 1000)
    train = joined(source.train)
    assert train["labels"].sort().values.tolist() == list(range(1000))
    assert isinstance(source.validation, ImageBatches) and source.validation.skipped == 0
    val = REAL / "imagenet" / "val"
    folder = class_folders(val)
    assert all(WNIDS[int(label)] == path.split("/")[0] for path, label in zip(folder.paths, folder.labels, strict=True))
    assert 0.1 < train["inputs"].std() < 1 and train["inputs"].isfinite().all()


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="no cifar10/ under PARE_DATA")
def test_the_real_cifar_sample() -> None:
    source = cifar_bundle(REAL / "cifar10", batch_size=256)
    validation = joined(source.validation)
    assert (source.train_samples, len(validation["labels"])) == (8000, 2000)
    assert validation["labels"].unique().tolist() == list(range(10))
    images = validation["inputs"]
    along, across = (images.diff(dim=dim).abs().mean() for dim in (-1, -2))
    assert along < 0.2 and across < 0.2, "neighbours are alike only where rows and planes were read right"
