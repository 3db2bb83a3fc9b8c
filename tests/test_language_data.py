"""Text for causal language models: chunks, calibration windows, local files, and what is refused before any work."""

import gzip
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, normalizers, processors
from tokenizers.models import BPE
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from data.base import DataBundle
from data.c4 import c4
from data.corpus import Corpus, chunked, encoded, token_hash
from data.pydoc import chapters, pydoc
from data.text_folder import text_folder
from data.token_cache import TokenCache
from data.wikitext2 import wikitext2
from data.windows import document_windows, stream_windows
from models.byte_tokenizer import byte_tokenizer
from models.llama import Llama, llama
from tests.conftest import Compose
from utils.config import build
from utils.errors import InputError

DATA = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (PARE_DATA)")
SMALL: dict[str, Any] = {
    "length": 16, "batch_size": 2, "calibration_samples": 6, "calibration_length": 8, "calibration_batch_size": 4,
}  # fmt: skip
ROWS = ["", " = One = \n", "", " some text . \n", " more of it \n", "", " = Two = \n", "", " the end \n"]
DOCUMENTS = [f"document {n} " + "word " * (3 * n) for n in range(20)]


@pytest.fixture
def model() -> Llama:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    return llama(settings={**sizes, "max_position_embeddings": 64}, tokenizer="byte")


def folder(root: Path, **files: str) -> str:
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return str(root)


def plain(root: Path) -> str:
    return folder(root, train__txt="abcd " * 40 + "<|endoftext|>\n second", validation__txt="efgh " * 20)


def texts_of(data: DataBundle) -> list[str]:
    tokenizer = data.task.corpus.tokenizer  # type: ignore[attr-defined]
    return [tokenizer.decode(row) for batch in data.validation for row in batch["input_ids"]]


def test_a_folder_is_cut_into_chunks_and_windows(model: Llama, tmp_path: Path) -> None:
    data = text_folder(root=plain(tmp_path), **SMALL).prepare(model)
    tokens = [256, *("efgh " * 20).strip().encode()]  # ids of printable ASCII are shifted, so compare texts
    assert "".join(texts_of(data)) == ("<s>" + "efgh " * 20)[: 3 + len(tokens) // 16 * 16 - 1]
    assert [len(batch["input_ids"]) for batch in data.calibration] == [4, 2]
    assert all(batch["input_ids"].shape[1] == 8 and bool(batch["attention_mask"].all()) for batch in data.calibration)
    assert data.example["input_ids"].shape == (1, 8) and data.domain == "language"
    stream = encoded(model.preprocessing.tokenizer, ("abcd " * 40).strip()).tolist()
    stream += encoded(model.preprocessing.tokenizer, "second").tolist()
    seen = [row for batch in data.calibration for row in batch["input_ids"].tolist()]
    assert all(row in [stream[i : i + 8] for i in range(len(stream) - 8)] for row in seen)
    assert data.train_samples == len(stream) // 16
    assert "6 windows of 8 tokens" in data.notes[0] and "in-domain" in data.notes[0]


def test_windows_are_drawn_as_the_references_draw_them() -> None:
    tokens = torch.arange(100)
    random.seed(3)
    wanted = []
    for _ in range(50):
        start = random.randint(0, 100 - 10 - 1)
        wanted.append(list(range(start, start + 10)))
    assert stream_windows(tokens, 50, 10, 3, "x").tolist() == wanted
    starts = stream_windows(tokens, 5000, 10, 0, "x")[:, 0]
    assert (int(starts.min()), int(starts.max())) == (0, 89), "the last possible start, 90, is never drawn"
    assert len(set(starts.tolist())) < 5000, "with replacement"


def test_document_windows_are_drawn_as_the_references_draw_them() -> None:
    lengths = [3, 30, 12, 10, 11]
    documents = [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]
    random.seed(5)
    wanted = []
    for _ in range(40):
        while True:
            chosen = documents[random.randint(0, 4)]
            if len(chosen) > 10:
                break
        start = random.randint(0, len(chosen) - 10 - 1)
        wanted.append(chosen[start : start + 10].tolist())
    found = document_windows([str(i) for i in range(5)], lambda t: documents[int(t)], 40, 10, 5, "x")
    assert found.tolist() == wanted
    assert {int(row[0]) // 100 for row in found} == {1, 2, 4}, "ten tokens are not more than ten"
    with pytest.raises(InputError, match="calibration_length=30: must be below 30, the longest document of x"):
        document_windows([str(i) for i in range(5)], lambda t: documents[int(t)], 1, 30, 5, "x")


def test_the_same_seed_gives_the_same_and_another_gives_another(model: Llama, tmp_path: Path) -> None:
    first, again, other = (text_folder(root=plain(tmp_path), **SMALL, seed=seed).prepare(model) for seed in (0, 0, 1))
    assert first.fingerprints == again.fingerprints
    assert first.fingerprints["calibration"] != other.fingerprints["calibration"]
    assert first.fingerprints["validation"] == other.fingerprints["validation"]
    longer = text_folder(root=plain(tmp_path), **{**SMALL, "length": 32}).prepare(model)
    assert longer.fingerprints["calibration"] == first.fingerprints["calibration"], "lengths are independent"
    assert longer.fingerprints["validation"] != first.fingerprints["validation"]


def test_the_calibration_seed_changes_the_windows_alone(model: Llama, tmp_path: Path) -> None:
    root = plain(tmp_path)
    first, other, same = (
        text_folder(root=root, **SMALL, calibration_seed=seed).prepare(model) for seed in (None, 1, 0)
    )
    changed = {part for part in first.fingerprints if first.fingerprints[part] != other.fingerprints[part]}
    assert changed == {"calibration"} and first.fingerprints == same.fingerprints
    inner = text_folder(root=root, **SMALL)
    foreign = [text_folder(root=root, **SMALL, calibration=inner, calibration_seed=seed) for seed in (None, 1)]
    assert [source.prepare(model).fingerprints["calibration"] for source in foreign] == [
        first.fingerprints["calibration"], other.fingerprints["calibration"],
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["joined", "raw", "parquet"])
def test_wikitext2_is_the_same_from_every_layout(layout: str, model: Llama, tmp_path: Path) -> None:
    for split in ("train", "test"):
        if layout == "parquet":
            table = pyarrow.table({"text": ROWS})
            pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
        elif layout == "joined":
            (tmp_path / f"{split}.txt").write_text("\n\n".join(ROWS))
        else:
            (tmp_path / f"wiki.{split}.raw").write_text("".join(row or " \n" for row in ROWS))
    data = wikitext2(root=str(tmp_path), **SMALL).prepare(model)
    corpus = data.task.corpus  # type: ignore[attr-defined]
    tokenizer = model.preprocessing.tokenizer
    assert torch.equal(corpus.tokens, encoded(tokenizer, "\n\n".join(ROWS)))
    train = encoded(tokenizer, " ".join(ROWS))
    assert torch.equal(torch.cat([b["input_ids"] for b in data.calibration]), stream_windows(train, 6, 8, 0, "x"))
    assert [page.raw.split("\n")[0] for page in corpus.documents] == [" = One = ", " = Two = "]
    assert corpus.bos(corpus.chunks(16)) == "first token only"
    assert data.task.protocol == "wikitext2-test/token-chunk@16"  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", ["json.gz", "jsonl", "parquet"])
def test_c4_windows_lie_in_single_documents(layout: str, model: Llama, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "url": "x"}) for text in DOCUMENTS)
    if layout == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "train.parquet")
    else:
        name = "c4-train.00000-of-01024.json.gz" if layout == "json.gz" else "train.jsonl"
        content = lines.encode()
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if layout == "json.gz" else content)
    data = c4(root=str(tmp_path), **{**SMALL, "calibration_length": 20}).prepare(model)
    tokenizer = model.preprocessing.tokenizer
    texts = [tokenizer.decode(row) for batch in data.calibration for row in batch["input_ids"]]
    assert all(any(text.removeprefix("<s>") in document for document in DOCUMENTS[:18]) for text in texts)
    corpus = data.task.corpus  # type: ignore[attr-defined]
    assert corpus.name == "c4-held-out" and torch.equal(corpus.tokens, encoded(tokenizer, " ".join(DOCUMENTS[18:])))


def test_c4_takes_validation_files_where_there_are_some(model: Llama, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        lines = "\n".join(json.dumps({"text": f"{split} {text}"}) for text in DOCUMENTS)
        (tmp_path / f"c4-{split}.jsonl").write_text(lines)
    data = c4(root=str(tmp_path), **SMALL, validation_samples=3).prepare(model)
    corpus = data.task.corpus  # type: ignore[attr-defined]
    assert corpus.name == "c4-validation" and all(d.raw.startswith("validation ") for d in corpus.documents)
    assert len(corpus.documents) == 20 and len(corpus.chunks(16)) == 3 == sum(
        len(b["input_ids"]) for b in data.validation
    )


def test_calibration_may_come_from_another_source(model: Llama, composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    root = plain(tmp_path)
    foreign = ("+data@data.calibration=c4", f"data.calibration.root={tmp_path}/c4", "data.calibration.length=8",
               "data.calibration.calibration_samples=5", "data.calibration.calibration_length=12")  # fmt: skip
    cfg = composed("model=tiny_llama", "data=text", f"data.root={root}", "data.length=16", *foreign)
    data = build(cfg.data).prepare(model)
    assert [tuple(batch["input_ids"].shape) for batch in data.calibration] == [(4, 12), (1, 12)]
    assert "of c4" in data.notes[0] and "another domain" in data.notes[0] and data.example["input_ids"].shape == (1, 12)
    (tmp_path / "short").mkdir()
    short = text_folder(root=folder(tmp_path / "short", train__txt="abc", test__txt="abc"), **SMALL)
    with pytest.raises(InputError, match="^data.calibration.calibration_length=8: must be below 4"):
        text_folder(root=root, **SMALL, calibration=short).prepare(model)
    with pytest.raises(InputError, match="data.calibration=3: must be null or another source"):
        text_folder(root=root, calibration=3)


def test_pydoc_needs_no_download_and_keeps_its_splits_apart(model: Llama) -> None:
    train, held_out = chapters()
    assert not set(train) & set(held_out) and sum(map(len, train)) > 300_000 and sum(map(len, held_out)) > 20_000
    data = pydoc(length=64, calibration_length=32, train_samples=5, validation_samples=4).prepare(model)
    assert data.train_samples == 5 and len(texts_of(data)) == 4
    assert data.task.corpus.name.startswith("pydoc-3.")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calibration_length": 65}, "data.calibration_length=65: must be at most 64, the context of model=llama"),
        ({"length": 65}, "data.length=65: must be at most 64"),
        ({"tokens": 65}, "data.tokens=65: must be at most 64"),
        ({"calibration_length": 0}, "calibration_length=0 must be at least 1"),
    ],
)
def test_lengths_beyond_the_context_are_refused(changed: dict, message: str, model: Llama, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        text_folder(root=plain(tmp_path), **{**SMALL, **changed}).prepare(model)


def test_texts_that_are_too_short_are_refused(model: Llama, tmp_path: Path) -> None:
    root = folder(tmp_path, train__txt="abcd " * 40, validation__txt="efgh")
    with pytest.raises(InputError, match="data.length=16: must be at most 5, all tokens that .*-validation has"):
        text_folder(root=root, **SMALL).prepare(model)
    root = folder(tmp_path, train__txt="abc", validation__txt="efgh " * 20)
    with pytest.raises(InputError, match="data.calibration_length=8: must be below 4, all tokens"):
        text_folder(root=root, **SMALL).prepare(model)


def test_what_is_not_there_is_named(model: Llama, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder with a file train"):
        text_folder(root=str(tmp_path))
    folder(tmp_path, train__txt="x")
    with pytest.raises(InputError, match="validation\\* or valid\\* or test\\*"):
        text_folder(root=str(tmp_path))
    folder(tmp_path, test__txt="   ")
    with pytest.raises(InputError, match="hold no text"):
        text_folder(root=str(tmp_path), **SMALL).prepare(model)
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="test.txt is not UTF-8"):
        text_folder(root=str(tmp_path), **SMALL).prepare(model)
    with pytest.raises(InputError, match=r"data=wikitext2: is not on this machine.*data.root="):
        wikitext2(**SMALL).prepare(model)
    with pytest.raises(InputError, match=r"data=c4 \(allenai/c4, en/c4-train.*data.root="):
        c4(**SMALL).prepare(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "damaged or no file"),
        (gzip.compress(b'{"text": "a"}\n{', mtime=0), "line 2 must be one JSON object"),
        (gzip.compress(b'{"text": "a"}\n{"body": "b"}', mtime=0), "row 2 must have a text 'text'"),
        (gzip.compress(b'{"text": "a"}', mtime=0), "must hold at least 10 documents; it has 1"),
    ],
)
def test_damaged_files_are_named(content: bytes, message: str, model: Llama, tmp_path: Path) -> None:
    (tmp_path / "c4-train.json.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        c4(root=str(tmp_path), **SMALL).prepare(model)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
    bare = llama(settings={**sizes, "num_attention_heads": 2})
    with pytest.raises(InputError, match="needs a model with a tokenizer"):
        text_folder(root=plain(tmp_path), **SMALL).prepare(bare)


def test_bytes_come_back_as_they_were() -> None:
    tokenizer = byte_tokenizer(64)
    text = "Zürich\n\n\tdef  f(x): # 漢字\x00"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode()) and ids[0] == tokenizer.bos_token_id and max(ids[1:]) < 256
    assert tokenizer.decode(ids[1:]) == text


def test_chunks_drop_the_tail() -> None:
    assert chunked(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chunked(torch.arange(3), 4).shape == (0, 4)
    assert token_hash(torch.arange(3)) == token_hash(torch.arange(3, dtype=torch.int32)) != token_hash(torch.arange(4))


def llama2_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Llama-2's tokenizer from its pieces and their scores; of two pairs the one whose whole scores higher merges."""
    content, place, pieces = file.read_bytes(), 4, list[tuple[str, float]]()
    while place < len(content):
        score, size = struct.unpack_from("<fi", content, place)
        place += 8 + size
        pieces.append((content[place - size : place].decode().replace(" ", "▁"), score))
    pieces[:3] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    pairs = [(-score, p[:i], p[i:]) for p, score in pieces for i in range(1, len(p)) if {p[:i], p[i:]} <= ids.keys()]
    merges = [(left, right) for _, left, right in sorted(pairs, key=lambda p: (p[0], ids[p[1]], ids[p[2]]))]
    rules = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    rules.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")


# tokens and chunks of the test split; Llama-2's 83 chunks at 4096 are those of the published perplexities
COUNTS = {
    "llama2": (341_469, {1024: 333, 2048: 166, 4096: 83}, "65edb8ed86ac640f", "first token only"),
    "gpt2": (287_644, {1024: 280, 2048: 140, 4096: 70}, "c3b774ccf30316b5", "none"),
}


@real
@pytest.mark.parametrize("name", COUNTS)
def test_wikitext2_has_the_known_number_of_chunks(name: str) -> None:
    folder, (tokens, chunks, digest, begin) = DATA / "tokenizers" / name, COUNTS[name]
    if name == "llama2":
        tokenizer = llama2_tokenizer(folder / "tokenizer.bin")
    else:
        tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    source = wikitext2(root=str(DATA / "text/wikitext-2-raw"))
    stream = source.load(tokenizer, TokenCache()).measured()
    corpus = Corpus("wikitext2-test", stream, [], tokenizer, "documents")
    assert len(stream) == tokens and {length: len(corpus.chunks(length)) for length in chunks} == chunks
    assert token_hash(corpus.chunks(4096)).startswith(digest) and corpus.bos(corpus.chunks(4096)) == begin


@real
@pytest.mark.parametrize("source", ["wikitext-2-raw", "c4", "tinystories"])
def test_shared_texts_are_read(source: str) -> None:
    stories = llama(checkpoint=str(DATA / "llama_stories260k"))
    sizes = {"length": 256, "calibration_samples": 4, "calibration_length": 256, "train_samples": 4}
    make = {"wikitext-2-raw": wikitext2, "c4": c4, "tinystories": text_folder}[source]
    data = make(root=str(DATA / "text" / source), **sizes).prepare(stories)
    assert sum(len(batch["input_ids"]) for batch in data.calibration) == 4 and data.train_samples == 4
