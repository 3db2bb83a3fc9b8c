"""Texts are tokenised once: what is kept, what it is kept under, and what happens to a damaged file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base import DataBundle, prepared
from data.c4 import c4
from data.causal_text import CausalText
from data.pydoc import pydoc
from data.text_folder import text_folder
from data.wikitext2 import wikitext2
from models.llama import Llama, llama
from utils.storage import Store

SMALL: dict[str, Any] = {
    "length": 16, "batch_size": 2, "calibration_samples": 6, "calibration_length": 8, "calibration_batch_size": 4,
}  # fmt: skip
ROWS = ["", " = One = \n", "", " some text . \n" * 9, "", " = Two = \n", "", " the end \n"]


@pytest.fixture
def model() -> Llama:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    return llama(settings={**sizes, "max_position_embeddings": 64}, tokenizer="byte")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files that every source can read."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text("abcd " * 4 + "<|endoftext|>\n second" + " word" * 30)
    (folder / "validation.txt").write_text("efgh " * 20)
    return folder


def folder_source(root: Path, **changed: Any) -> CausalText:
    return text_folder(root=str(root), **{**SMALL, **changed})


def rows_source(root: Path, **changed: Any) -> CausalText:
    for split in ("train", "test"):
        (root / f"wiki.{split}.raw").write_text("".join(row or " \n" for row in ROWS))
    (root / "train.txt").unlink(missing_ok=True)
    return wikitext2(root=str(root), **{**SMALL, **changed})


def shard_source(root: Path, **changed: Any) -> CausalText:
    for path in root.glob("*.txt"):
        path.unlink()
    texts = [f"document {n} " + "word " * (3 * n) for n in range(20)]
    (root / "c4-train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return c4(root=str(root), **{**SMALL, **changed})


def manual_source(root: Path, **changed: Any) -> CausalText:
    return pydoc(**{**SMALL, "train_samples": 4, "validation_samples": 4, **changed})


SOURCES = {"text": folder_source, "wikitext2": rows_source, "c4": shard_source, "pydoc": manual_source}


def same(first: DataBundle, second: DataBundle) -> bool:
    one, other = first.task.corpus, second.task.corpus  # type: ignore[attr-defined]
    alike = one.name == other.name and one.facts == other.facts and [*one.documents] == [*other.documents]
    return alike and first.fingerprints == second.fingerprints and torch.equal(one.tokens, other.tokens)


class Counted:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def counted(model: Llama) -> Counted:
    found = Counted(model.preprocessing.tokenizer)
    model.preprocessing = type(model.preprocessing)(found, model.preprocessing.longest)
    return found


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_the_second_time_nothing_is_tokenised(make: Callable, model: Llama, root: Path, tmp_path: Path) -> None:
    store, tokenizer = Store(tmp_path / "store"), counted(model)
    plain = make(root).prepare(model)
    documents = plain.task.corpus.document_tokens
    first = prepared(make(root), model, store)
    assert first.task.corpus.document_tokens == documents  # type: ignore[attr-defined]
    done = tokenizer.calls
    again = prepared(make(root), model, store)
    assert again.task.corpus.document_tokens == documents and tokenizer.calls == done > 0  # type: ignore[attr-defined]
    assert same(plain, first) and same(plain, again)
    names = {path.name.split("-")[0] for path in (tmp_path / "store").rglob("*.safetensors")}
    assert names == {"train", "windows", "measured", "documents"}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(
    "changed", [{"calibration_seed": 1}, {"calibration_length": 9}, {"calibration_samples": 7}], ids=str
)
def test_other_windows_are_drawn_anew(make: Callable, changed: dict, model: Llama, root: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before = prepared(make(root), model, store)
    found = prepared(make(root, **changed), model, store)
    assert same(found, make(root, **changed).prepare(model)), "kept windows of other settings were taken"
    assert found.fingerprints["calibration"] != before.fingerprints["calibration"]
    assert found.fingerprints["train"] == before.fingerprints["train"]
    assert len([*store.root.rglob("windows-*.safetensors")]) == 2
    assert len([*store.root.rglob("train-*.safetensors")]) == 1, "the text is the same"


def test_another_text_tokenizer_or_separator_is_another_key(model: Llama, root: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = prepared(folder_source(root), model, store)
    other = prepared(folder_source(root, separator=None), model, store)
    assert other.fingerprints["train"] != first.fingerprints["train"]
    (root / "train.txt").write_text("abce " * 40)
    changed = prepared(folder_source(root), model, store)
    assert same(changed, folder_source(root).prepare(model)) and not same(changed, first)
    rules = model.preprocessing.tokenizer.backend_tokenizer
    rules.post_processor = None  # no token in front any more
    bare = prepared(folder_source(root), model, store)
    assert same(bare, folder_source(root).prepare(model)) and not same(bare, changed)


def test_a_damaged_file_is_made_again(model: Llama, root: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = prepared(folder_source(root), model, store)
    for path in store.root.rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert same(prepared(folder_source(root), model, store), first)
    for path in store.root.rglob("*.json"):
        path.write_text("{ half")
    tokenizer = counted(model)
    assert same(prepared(folder_source(root), model, store), first) and tokenizer.calls == 2
    assert same(prepared(folder_source(root), model, store), first) and tokenizer.calls == 2


def test_sources_without_texts_are_prepared_as_before(model: Llama, root: Path, tmp_path: Path) -> None:
    bundle = folder_source(root).prepare(model)

    class Plain:
        def prepare(self, model: Llama) -> DataBundle:
            return bundle

    store = Store(tmp_path / "store")
    assert prepared(Plain(), model, store) is bundle and prepared(bundle, model, store) is bundle  # type: ignore[arg-type]
    assert not store.root.exists()
