"""Files made to hurt: each is refused with one message, soon, and nothing in them is run or unpacked."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.cifar_files import read_pickle
from data.documents import read_texts
from data.image_files import most_pixels, open_image
from data.imagenet import imagenet
from data.images import Broken
from data.long_text import LONGEST_LINE
from data.pairs import listed
from data.tables import read_rows
from data.text_folder import text_folder
from models import limits
from models.checkpoint import load_model, save_model
from models.hf import config_of
from models.limits import bounded_building
from models.remote_code import refuse_remote_code
from models.toy_encoder import toy_encoder
from tests.adapters import ADAPTERS
from utils.errors import InputError
from utils.plain_json import parsed
from utils.storage import folder_name

MOST_SECONDS = 10.0
DEEP = "[" * 200_000


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < MOST_SECONDS


class Calls:
    """Calls a function when it is unpickled by a reader that lets it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def toy(checkpoint: Path) -> Any:
    return toy_encoder(classes=3, image_size=4, width=8, heads=2, checkpoint=str(checkpoint))


# --- weights


def pickled(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {mark}")))


def torch_zip(path: Path, mark: Path) -> None:
    torch.save({"model": Calls(os.system, f"touch {mark}")}, path)


def torch_legacy(path: Path, mark: Path) -> None:
    torch.save(Calls(os.system, f"touch {mark}"), path, _use_new_zipfile_serialization=False)


def claims_a_shape(path: Path, mark: Path) -> None:
    torch.save({"cls": torch.zeros(1).expand(10**6, 10**6)}, path)


def sparse(path: Path, mark: Path) -> None:
    torch.save({"cls": torch.zeros(3, 3).to_sparse()}, path)


def packed_zeros(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))


def slipping_zip(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../../../../{mark}", "out")
        archive.writestr(str(mark), "out")


def slipping_tar(path: Path, mark: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in (f"../{mark.name}", str(mark)):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


WEIGHTS = (pickled, torch_zip, torch_legacy, claims_a_shape, sparse, packed_zeros, slipping_zip, slipping_tar)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", WEIGHTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
def test_hostile_weights(make: Callable[[Path, Path], None], suffix: str, tmp_path: Path) -> None:
    path, mark = tmp_path / f"weights.{suffix}", tmp_path / "hacked"
    make(path, mark)
    with pytest.raises(InputError, match=rf"model.checkpoint=.*weights\.{suffix}") as caught:
        toy(path)
    assert not mark.exists() and len(str(caught.value)) < 600
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"))
    with pytest.raises(InputError, match="model.checkpoint="):
        toy(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 10) + b"{}",
        *(struct.pack("<Q", len(text)) + text + bytes(4) for text in (
            json.dumps({"cls": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode(),
            json.dumps({"cls": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}).encode(),
            json.dumps({"cls": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}).encode(),
            DEEP.encode(),
        )),
    ],
)  # fmt: skip
def test_a_header_that_lies(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="x.safetensors is damaged or no safetensors file"):
        toy(tmp_path / "x.safetensors")


# --- manifests


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(ADAPTERS["toy_images"]()[0], tmp_path / "model")


ABSURD = ({"depth": 10**9}, {"width": 10**9}, {"neurons": 10**12}, {"image_size": 10**8}, {"width": 2**20, "depth": 99})


@pytest.mark.parametrize("sizes", ABSURD, ids=str)
@pytest.mark.parametrize("load", [toy, load_model])
def test_a_manifest_of_absurd_sizes(load: Any, sizes: dict[str, int], saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["arguments"] |= sizes
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with (
        pytest.raises(InputError, match="must be at most|must fit|must be smaller|can hold"),
        bounded_building("model"),
    ):
        load(saved)


def test_sizes_from_a_configuration_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_TENSORS", 500)
    sizes: dict[str, Any]
    for sizes in ({"neurons": 10**12}, {"depth": 10**6, "width": 2, "neurons": 1, "heads": 1}):
        with pytest.raises(InputError, match="model: "), bounded_building("model", 10**9):
            toy_encoder(**{"classes": 3, "image_size": 4, "width": 8, "heads": 2, **sizes})
    with bounded_building("model", 10**9):
        toy_encoder(classes=3, image_size=4, width=8, heads=2)


@pytest.mark.parametrize("text", [DEEP, '{"format": NaN}', '{"format": Infinity}', "[]", "5", '"text"', "{}", "\0"])
def test_a_manifest_that_is_no_json_of_ours(text: str, saved: Path) -> None:
    (saved / "manifest.json").write_text(text)
    for load in (toy, load_model):
        with pytest.raises(InputError, match="manifest.json is damaged"):
            load(saved)


def test_a_manifest_may_not_call_what_builds_no_model(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for builder in ("os.system", "models.checkpoint.save_model", "models.checkpoint.shutil.rmtree", "models.nowhere.x"):
        (saved / "manifest.json").write_text(json.dumps(manifest | {"builder": builder}))
        with pytest.raises(InputError, match="was saved (by|from)|are damaged"):
            load_model(saved)


@pytest.mark.parametrize("text", [DEEP, "NaN", "{", '{"a": -Infinity}'])
def test_json_is_plain(text: str) -> None:
    with pytest.raises(ValueError):
        parsed(text)


# --- code that comes with a model


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_models_own_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')")
    kinds = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / name).write_text(json.dumps({"model_type": "evil", **kinds}))
    with pytest.raises(InputError, match=f"{name} has auto_map, code of its own, which is never run"):
        config_of(str(tmp_path), True, {})
    assert not (tmp_path / "hacked").exists()


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(InputError, match="config.json is damaged: it nests too deeply"):
        refuse_remote_code(tmp_path)


# --- CIFAR's pickles


ARRAY = np.zeros((1, 3072), np.uint8)
REBUILD: Any = ARRAY.__reduce__()[0]
CIFAR = {
    "a call": pickle.dumps({b"data": Calls(os.system, "true")}, 2),
    "bytes of a number": pickle.dumps(Calls(bytearray, 10**12), 2),
    "an array of a size": pickle.dumps(Calls(np.ndarray, (10**12,)), 2),
    "a rebuilt array of a size": pickle.dumps(Calls(REBUILD, np.ndarray, (10**12,), b"b"), 2),
    "an array of objects": pickle.dumps({b"data": np.array([print], dtype=object)}, 2),
    "a far memo": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
    "a claimed size": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
}


@pytest.mark.parametrize("content", CIFAR.values(), ids=CIFAR.keys())
def test_hostile_pickles_of_cifar(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(InputError, match="data.root: .*data_batch_1"):
        read_pickle(tmp_path / "data_batch_1", 10)


def test_a_good_pickle_of_cifar_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps({b"data": ARRAY + 7, b"labels": [3]}, 2))
    pixels, labels = read_pickle(tmp_path / "x", 10)
    assert pixels.shape == (1, 3, 32, 32) and pixels.unique().tolist() == [7] and labels.tolist() == [3]


# --- images


def bomb(path: Path) -> Path:
    """A PNG of some bytes that says it has four billion pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", 65536, 65536)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)
    return path


def test_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    with pytest.raises(Image.DecompressionBombError, match=f"must have at most {most_pixels():,} pixels"):
        open_image(bomb(tmp_path / "x.png"))
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None and before == most_pixels()
    with pytest.raises(InputError, match="x.png: has 9x9 pixels"):
        Broken("training", 10**6).add([("x.png", "DecompressionBombError: has 9x9 pixels")])


def test_a_format_that_starts_a_program(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(OSError, match="cannot identify"):
        open_image(tmp_path / "x.jpg")


# --- text


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl", "train.jsonl.gz", "train.tsv"])
def test_a_line_of_a_hundred_million_characters(name: str, tmp_path: Path) -> None:
    import gzip

    path, line = tmp_path / name, b"a" * 10**6
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as file:
        file.write(b"short\n")
        for _ in range(100):
            file.write(line)
    with pytest.raises(
        InputError, match=rf"{name} line 2 has at least .* characters; must have at most {LONGEST_LINE:,}"
    ):
        read_rows([path], {"text"}) if name.endswith("tsv") else read_texts(path)


def test_rows_that_nest_or_hold_nan(tmp_path: Path) -> None:
    for text in (DEEP, '{"text": NaN}'):
        (tmp_path / "train.jsonl").write_text(text)
        with pytest.raises(InputError, match="line 1 must be one JSON object"):
            read_texts(tmp_path / "train.jsonl")


# --- folders


def test_links_that_lead_back(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for link, target in (("self", "self"), ("val/back", ".."), ("val/n01440764", "n01440764")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "val" / "x.jpg").write_bytes(b"")
    assert listed(tmp_path, "val", [".jpg"]).count("val/x.jpg") == 1 and len(listed(tmp_path, "val", [".jpg"])) == 1
    with pytest.raises(InputError, match="data.root"):
        imagenet(root=str(tmp_path), workers=0).prepare(ADAPTERS["deit"]()[0])
    with pytest.raises(InputError, match="root"):
        imagenet(root=str(tmp_path / "self"))


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc/passwd", "a/../../b", "...", "", "\0x", "C:\\x", "x/" * 300])
def test_names_of_folders_stay_below_storage(name: str, tmp_path: Path) -> None:
    found = folder_name(name)
    assert "/" not in found and "\0" not in found and found.strip(".") and len(found.encode()) <= 255
    assert (tmp_path / found).resolve().parent == tmp_path


@pytest.mark.parametrize("make", [slipping_zip, slipping_tar])
def test_archives_are_not_unpacked(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    archive, mark = tmp_path / "data.zip", tmp_path / "hacked"
    make(archive, mark)
    with pytest.raises(InputError, match="data.root"):
        imagenet(root=str(archive), workers=0).prepare(ADAPTERS["deit"]()[0])
    with pytest.raises(InputError, match="data.root"):
        text_folder(root=str(archive))
    assert not mark.exists()
