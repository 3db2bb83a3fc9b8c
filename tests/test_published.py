"""The authors' rankings: read without running them, checked against a model, and refused where wrong."""

import io
import os
import pickle
import random
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from models.base import PrunableModel
from prune.optin import unpickled
from prune.optin.published import FILES, content_hash, find_published, published_scores, read_ranking
from tests.adapters import ADAPTERS
from utils.errors import InputError

TOKENS = 5  # of the tiny vision transformer, [CLS] included
Rows = list[tuple[Any, ...]]


def rows_of(model: PrunableModel, kind: str, tokens: int = 0) -> Rows:
    """What the authors would have written for a model: distinct negated scores, sorted ascending."""
    shuffled = random.Random(3)
    groups = [group for group in model.unit_groups() if group.kind == kind]
    places = [(group.layer, index) for group in groups for index in range(group.count + tokens)]
    scores = shuffled.sample(range(1, 10 * len(places)), len(places))
    found = [(torch.tensor(-float(score) / 8), *place, kind) for score, place in zip(scores, places, strict=True)]
    return sorted(found, key=lambda row: float(row[0]))


def written(path: Path, content: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def ranking(
    folder: Path, model: PrunableModel, tokens: int = 0, replaced: Mapping[str, Rows] | None = None
) -> tuple[Path, dict[str, Rows]]:
    """Both files of a model in a folder; rows of a kind may be replaced."""
    rows = {"head": rows_of(model, "head"), "neuron": rows_of(model, "neuron", tokens), **(replaced or {})}
    for kind, name in FILES.items():
        written(folder / name, rows[kind])
    return folder, rows


@pytest.mark.parametrize(("adapter", "tokens"), [("bert", None), ("deit", None), ("deit", TOKENS)])
def test_rankings_become_scores_of_the_models_units(adapter: str, tokens: int | None, tmp_path: Path) -> None:
    model, _ = ADAPTERS[adapter]()
    folder, rows = ranking(tmp_path, model, tokens or 0)
    written(folder / "head_ranking_cap.pkl", b"never read")
    scores = published_scores(folder, model, tokens).terms["published"]
    sizes = {group.name: group.count for group in model.unit_groups()}
    blocks = model.blocks()
    assert {name: len(values) for name, values in scores.items()} == sizes | (
        {f"{block}.tokens": TOKENS for block in blocks} if tokens else {}
    )
    assert all(values.dtype == torch.float32 for values in scores.values())
    places = {(group.kind, group.layer): group for group in model.unit_groups()}
    for kind, found in rows.items():
        for score, layer, index, _ in found:
            group = places[kind, layer]
            inside = index < group.count
            values = scores[group.name] if inside else scores[f"{blocks[layer]}.tokens"]
            assert values[index if inside else index - group.count] == -score


def test_token_positions_may_be_absent(tmp_path: Path) -> None:
    model, _ = ADAPTERS["deit"]()
    scores = published_scores(ranking(tmp_path, model)[0], model, TOKENS).terms["published"]
    assert not any(name.endswith("tokens") for name in scores)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_kinds_of_score_that_are_read(protocol: int, tmp_path: Path) -> None:
    view = torch.tensor([1.0, -0.25])[1]
    scores = [torch.tensor(-2.5), torch.tensor(-1.5, dtype=torch.float64), -0.5, view, torch.tensor(0.0).half()]
    rows = [(score, 300, index, "neuron") for index, score in enumerate(scores)]
    found = read_ranking(written(tmp_path / "x.pkl", rows, protocol))
    assert found == [(value, 300, i, "neuron") for i, value in enumerate([-2.5, -1.5, -0.5, -0.25, 0.0])]
    assert all(type(row[0]) is float for row in found)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def storage_bytes(value: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(value._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tensor_of(*arguments: Any) -> Calls:
    return Calls(_rebuild_tensor_v2, *arguments)


def rows_with(score: Any) -> Rows:
    return [(torch.tensor(-2.0), 0, 0, "head"), (score, 0, 1, "head")]


STORAGE = Calls(torch.storage._load_from_bytes, storage_bytes(torch.tensor(1.0)))
PAIR = Calls(torch.storage._load_from_bytes, storage_bytes(torch.ones(2)))
WHOLE = pickle.dumps([(torch.tensor(-1.0), 0, 0, "head")], 4)
NONE: OrderedDict[str, Any] = OrderedDict()
HUGE = storage_bytes(torch.tensor(1.0)).replace(b"K\x01Ntq\x04Q", b"\x8a\x06\0\0\0\0\0\x10Ntq\x04Q")
REFUSED: dict[str, tuple[object, str]] = {
    "foreign callable": (rows_with(Calls(os.system, "touch called")), "row 1: asks for posix.system"),
    "eval": (rows_with(Calls(eval, "open('called', 'w')")), "row 1: asks for builtins.eval"),
    "foreign class": ([Path("x")], "asks for pathlib"),
    "another function of torch": (rows_with(Calls(torch.load, "x")), "asks for torch.serialization.load"),
    "attribute of a name": (
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x1c_rebuild_tensor_v2.__class__\x93.",
        "_rebuild_tensor_v2.__class__",
    ),
    "old protocol": (b"\x80\x02cos\nsystem\n(X\x01\0\0\0xtR.", "row 0: asks for os.system"),
    "parameter": (rows_with(torch.nn.Parameter(torch.tensor(1.0))), "row 1: asks for torch._utils._rebuild_parameter"),
    "instance": (b"\x80\x04(cos\nsystem\no.", "has the instruction OBJ at byte 14"),
    "old instance": (b"(S'touch called'\nios\nsystem\n.", "has the instruction STRING at byte 1"),
    "attributes": (b"\x80\x04)}b.", "has the instruction EMPTY_DICT"),
    "binary persistent id": (b"\x80\x04\x8c\x01xQ.", "has the instruction BINPERSID at byte 5"),
    "persistent id": (b"Px\n.", "has the instruction PERSID at byte 0"),
    "extension": (b"\x80\x04\x82\x01.", "has the instruction EXT1"),
    "array of a claimed size": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "must be a whole pickle"),
    "bytes of a claimed size": (b"\x80\x04B" + struct.pack("<I", 2**31 - 1) + b".", "must be a whole pickle"),
    "text of a claimed size": (b"\x80\x04X" + struct.pack("<I", 2**31 - 1) + b".", "must be a whole pickle"),
    "frame of a claimed size": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"].", "cannot be read"),
    "object of a claimed number": (b"\x80\x04]r\xff\xff\xff\xff.", "numbers an object 4294967295 at byte 3"),
    "tensor of a claimed size": (rows_with(Calls(torch.storage._load_from_bytes, HUGE)), "row 1: cannot be read"),
    "empty": (b"", "must be a whole pickle"),
    "truncated": (WHOLE[:-20], "must be a whole pickle"),
    "no end": (WHOLE[:-1], "must be a whole pickle; damaged behind byte"),
    "no pickle": (b"PK\x03\x04 or anything else", "prune.rankings: "),
    "two pickles": (WHOLE + WHOLE, f"must end with its pickle; {len(WHOLE)} bytes follow"),
    "nothing on the stack": (b"\x80\x04.", "cannot be read"),
    "unset object": (b"\x80\x04h\x07.", "cannot be read"),
    "tuple of rows": (((torch.tensor(-1.0), 0, 0, "head"),), "holds a tuple; must be a list of rows"),
    "single tensor": (torch.tensor(1.0), "holds a Tensor; must be a list of rows"),
    "nested": (b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", "row 0: is a list; must be a tuple"),
    "contains itself": (b"\x80\x04]\x94h\x00a.", "row 0: is a list; must be a tuple"),
    "row of a cap file": ([(torch.tensor(-1.0), 0)], "row 0: is a tuple of 2; must be a tuple (score, layer, index"),
    "row is a list": ([[torch.tensor(-1.0), 0, 0, "head"]], "row 0: is a list"),
    "score is whole": (rows_with(-1), "row 1: score is a int; must be a single floating number"),
    "score is text": (rows_with("-1"), "row 1: score is a str"),
    "score is a row of numbers": (rows_with(torch.ones(1)), "row 1: has a tensor with dimensions"),
    "score is a whole tensor": (rows_with(torch.tensor(1)), "row 1: score is a Tensor; must be a single floating"),
    "score is complex": (rows_with(torch.tensor(1j)), "row 1: score is a Tensor"),
    "score is NaN": (rows_with(torch.tensor(float("nan"))), "row 1: score=nan must be finite"),
    "score is infinite": (rows_with(float("-inf")), "row 1: score=-inf must be finite"),
    "score is too large": (rows_with(-1e39), "row 1: score=-1e+39 must be finite, and fit a float32"),
    "layer is a bool": ([(torch.tensor(-1.0), True, 0, "head")], "row 0: layer is a bool; must be a whole number"),
    "index is a bool": ([(torch.tensor(-1.0), 0, False, "head")], "row 0: index is a bool"),
    "layer is a float": ([(torch.tensor(-1.0), 0.0, 0, "head")], "row 0: layer is a float"),
    "index is a tensor": ([(torch.tensor(-1.0), 0, torch.tensor(1.0), "head")], "row 0: index is a Tensor"),
    "index is negative": ([(torch.tensor(-1.0), 0, -1, "head")], "row 0: index is negative; must be at least 0"),
    "unknown kind": ([(torch.tensor(-1.0), 0, 0, "patch")], "row 0: kind must be one of head, neuron"),
    "tensor of nothing": (rows_with(tensor_of(1, 0, (), (), False, NONE)), "row 1: has a tensor on a int"),
    "tensor without a storage": (rows_with(tensor_of()), "row 1: cannot be read (TypeError"),
    "shape of a claimed size": (rows_with(tensor_of(STORAGE, 0, (2**50,), (0,), False, NONE)), "with dimensions"),
    "offset outside": (rows_with(tensor_of(PAIR, 2, (), (), False, NONE)), "offset must be a whole number below 2"),
    "offset of a claimed size": (
        rows_with(tensor_of(PAIR, 2**40, (), (), False, NONE)),
        "must be a whole number below 2",
    ),
    "offset before": (rows_with(tensor_of(PAIR, -1, (), (), False, NONE)), "offset must be a whole number"),
    "offset is a bool": (rows_with(tensor_of(PAIR, True, (), (), False, NONE)), "offset must be a whole number"),
    "hooks": (rows_with(tensor_of(STORAGE, 0, (), (), False, [(0, 1)])), "with hooks or metadata"),
    "metadata": (rows_with(tensor_of(STORAGE, 0, (), (), False, NONE, (1,))), "with hooks or metadata"),
    "too few arguments": (rows_with(tensor_of(STORAGE, 0, (), ())), "row 1: has a tensor with hooks or metadata"),
    "bad storage": (rows_with(Calls(torch.storage._load_from_bytes, b"x")), "row 1: cannot be read"),
    "storage is text": (rows_with(Calls(torch.storage._load_from_bytes, "x")), "at most 4096 bytes"),
    "storage of many": (rows_with(torch.ones(2000)[0]), "row 1: has a storage that must be at most 4096 bytes"),
    "call inside a storage": (
        rows_with(Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, "touch called"), 2))),
        "row 1: cannot be read",
    ),
}


@pytest.mark.parametrize(("content", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_and_never_run(
    content: object, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "ranking.pkl", content)
    with pytest.raises(InputError) as caught:
        read_ranking(path)
    assert part in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranking.pkl"], "something in the file was run"


def test_the_foreign_calls_would_run_if_they_were_let(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(REFUSED["foreign callable"][0]))
    assert (tmp_path / "called").is_file()


def test_damage_anywhere_is_an_input_error_or_another_number(tmp_path: Path) -> None:
    chance = random.Random(5)
    whole = pickle.dumps([(torch.tensor(-float(i)), i, i, "head") for i in range(2)], 4)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            assert len(read_ranking(written(tmp_path / "x.pkl", bytes(content)))) <= 2
        except InputError as error:
            refused += str(tmp_path / "x.pkl") in str(error)
    assert 200 < refused < 400


def test_large_files_and_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.pkl", WHOLE)
    monkeypatch.setattr(unpickled, "LARGEST_BYTES", len(WHOLE) - 1)
    with pytest.raises(InputError, match=f"has {len(WHOLE)} bytes; must have at most {len(WHOLE) - 1}"):
        read_ranking(path)
    for missing in (tmp_path, tmp_path / "nothing.pkl"):
        with pytest.raises(InputError, match="must be there"):
            read_ranking(missing)


def changed(rows: Rows, row: int, *values: Any) -> Rows:
    return [*rows[:row], values, *rows[row + 1 :]]


@pytest.mark.parametrize("tokens", [None, TOKENS])
@pytest.mark.parametrize(
    ("kind", "change", "part"),
    [
        ("head", lambda rows: rows[:-1], "has 7 rows; must have 8, one for each head of the model's 2 layers"),
        ("head", lambda rows: [*rows, *rows], "has 16 rows; must have 8"),
        ("neuron", lambda rows: rows[1:], "must have 48, one for each neuron of the model's 2 layers"),
        ("neuron", lambda rows: [], "has 0 rows"),
        ("head", lambda rows: changed(rows, 5, *rows[2]), "row 5: repeats head"),
        ("neuron", lambda rows: changed(rows, 40, *rows[7]), "from row 7; must be there once"),
        ("head", lambda rows: changed(rows, 1, 0.0, 2, 0, "head"), "row 1: layer=2 must be below the model's 2"),
        ("head", lambda rows: changed(rows, 1, 0.0, 1, 4, "head"), "row 1: head=4 of layer 1 must be below 4"),
        ("neuron", lambda rows: changed(rows, 3, 0.0, 0, 99, "neuron"), "row 3: neuron=99 of layer 0 must be below 2"),
        ("head", lambda rows: changed(rows, 0, 0.0, 0, 0, "neuron"), "row 0: is of a neuron; must be of a head"),
    ],
)
def test_rows_that_are_not_the_models_units_are_refused(
    kind: str, change: Any, part: str, tokens: int | None, tmp_path: Path
) -> None:
    model, _ = ADAPTERS["deit"]()
    folder, rows = ranking(tmp_path, model, tokens or 0)
    published_scores(folder, model, tokens)  # right as it was
    ranking(tmp_path, model, tokens or 0, {kind: change(rows[kind])})
    with pytest.raises(InputError, match="^prune.rankings: ") as caught:
        published_scores(folder, model, tokens)
    assert part in str(caught.value) and FILES[kind] in str(caught.value)


def test_rankings_of_another_model_are_refused(tmp_path: Path) -> None:
    vision, _ = ADAPTERS["deit"]()
    language, _ = ADAPTERS["bert"]()
    folder, _ = ranking(tmp_path, vision, TOKENS)
    with pytest.raises(InputError, match="has 58 rows; must have 48"):
        published_scores(folder, vision, None)
    with pytest.raises(InputError, match="has 58 rows; must have 48.*or 62 with 7 token positions a layer"):
        published_scores(folder, vision, TOKENS + 2)
    with pytest.raises(InputError, match="has 58 rows; must have 40"):
        published_scores(folder, language, None)
    with pytest.raises(InputError, match="one group of heads and one of neurons a layer; model=resnet18 has channel"):
        published_scores(folder, ADAPTERS["resnet_basic"]()[0], None)
    (folder / FILES["head"]).unlink()
    with pytest.raises(InputError, match="head_ranking_body.pkl: must be there"):
        published_scores(folder, vision, TOKENS)


@pytest.mark.parametrize(
    ("tree", "asked"),
    [
        ("language/mnli/bert-base-uncased", ("language", "glue-mnli", "bert-base-uncased")),
        ("language/mnli/bert-base-uncased", ("language", "mnli", "google-bert/bert-base-uncased")),
        ("vision/ImageNet/deit-small-patch16-224", ("vision", "imagenet", "deit_small_patch16_224")),
    ],
)
def test_the_authors_tree_is_found_by_our_names(tree: str, asked: tuple[str, str, str], tmp_path: Path) -> None:
    domain, dataset, model = asked
    assert find_published(tmp_path / "nowhere", *asked) is None
    own = tmp_path / domain / dataset / model.rpartition("/")[2]
    written(own / "optin-0123.safetensors", b"")  # our cache lies beside theirs, or in the same folder
    for name in FILES.values():
        assert find_published(tmp_path, *asked) is None, "one file alone is no ranking"
        written(tmp_path / tree / name, [])
    assert find_published(tmp_path, *asked) == tmp_path / tree
    assert find_published(tmp_path, domain, "glue-qnli", model) is None
    assert find_published(tmp_path, domain, dataset, f"{model}-2") is None
    assert find_published(tmp_path, "synthetic", dataset, model) is None


def test_two_trees_of_one_name_are_refused(tmp_path: Path) -> None:
    for dataset in ("ImageNet", "image-net"):
        for name in FILES.values():
            written(tmp_path / "vision" / dataset / "deit-tiny" / name, [])
    with pytest.raises(InputError, match="both hold published rankings of deit_tiny; must be one"):
        find_published(tmp_path, "vision", "imagenet", "deit_tiny")


def test_the_hash_follows_both_files(tmp_path: Path) -> None:
    model, _ = ADAPTERS["bert"]()
    folder, rows = ranking(tmp_path, model)
    before = content_hash(folder)
    assert before == content_hash(folder)
    for kind in FILES:
        ranking(tmp_path, model, 0, {kind: changed(rows[kind], 0, -9.0, *rows[kind][0][1:])})
        assert content_hash(folder) != before
