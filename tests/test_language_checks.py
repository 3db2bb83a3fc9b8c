"""What is wrong with a run of a language model is said before it is trained, ranked or rewritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import prune.recipe
from data.base import Classification
from data.language_modelling import LanguageModelling
from data.regression import Regression
from data.squad_task import QuestionAnswering
from evals.accuracy import Accuracy
from evals.base import Measurement, refuse_unmeasurable
from evals.perplexity import Perplexity
from evals.report import Record
from evals.table import rows
from main import run
from models.llama import Llama, llama
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.test_cli import call
from utils.errors import InputError, RunError

SIZES = "{hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, max_position_embeddings: 64}"
TINY = (
    "model=tiny_llama", f"model.settings={SIZES}", "data=pydoc", "data.length=32", "data.calibration_length=16",
    "data.calibration_samples=8", "data.train_samples=8", "data.validation_samples=4", "prune=wanda",
    "evals=[perplexity]",
)  # fmt: skip
ALL = "evals=[perplexity,word_perplexity,byte_perplexity]"
DOCUMENTS = ("evals.word_perplexity.max_length=66", "evals.byte_perplexity.max_length=67")


class TrainedTooEarly(Exception):
    """A run got as far as its weights."""


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run may reach its training."""

    def never(*args: object) -> None:
        raise TrainedTooEarly

    monkeypatch.setattr(prune.recipe, "with_weights", never)


CASES = [
    (("prune.pattern='3:5'", "prune.ratio=0.6"), ["prune.pattern=3:5: model.layers.0.self_attn.q_proj has 24 inputs"]),
    (("prune.pattern='4:8'",), ["mlp.down_proj has 20 inputs, which must be a multiple of 8"]),
    (("prune.pattern='2:4'", "prune.ratio=0.4"), ["prune.ratio=0.4: contradicts prune.pattern=2:4", "must be 0.5"]),
    (("prune.skip=['*.nope']",), ["prune.skip: '*.nope' matches no linear"]),
    (("evals.perplexity.length=65",), ["evals.perplexity.length=65: must be at most 64, the context of model=llama"]),
    (("evals.perplexity.length=1",), ["evals.perplexity.length=1: must be from 2 to", "all tokens that pydoc-3."]),
    ((ALL, *DOCUMENTS), ["evals.word_perplexity.max_length=66: must be at most 64", "evals.byte_perplexity.max_le"]),
    (("data.calibration_length=65",), ["data.calibration_length=65: must be at most 64, the context"]),
    (("evals=[perplexity,accuracy]",), ["evals=accuracy: data=pydoc is scored by token_perplexity, token_accuracy"]),
]


@pytest.mark.parametrize(("wrong", "parts"), CASES, ids=lambda value: " ".join(value))
def test_it_is_said_before_any_training(
    wrong: tuple[str, ...], parts: list[str], composed: Compose, untrained: None, tmp_path: Path
) -> None:
    overrides = [o for o in TINY if not (o.startswith("evals=") and wrong[0].startswith("evals="))]
    with pytest.raises(InputError) as caught:
        run(composed(*overrides, *wrong, f"storage={tmp_path / 's'}"), tmp_path / "out")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert len(str(caught.value).splitlines()) == (2 if wrong[0] == ALL else 1), "one line for each mistake"
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == "failed"


RIGHT = [
    ("evals.perplexity.length=64",),
    ("prune.pattern='2:4'",),
    ("prune.pattern='4:8'", "prune.skip=['*.down_proj']"),
]


@pytest.mark.parametrize("right", RIGHT, ids=str)
def test_what_is_right_gets_as_far_as_training(
    right: tuple[str, ...], composed: Compose, untrained: None, tmp_path: Path
) -> None:
    with pytest.raises(TrainedTooEarly):
        run(composed(*TINY, *right, f"storage={tmp_path / 's'}"), tmp_path / "out")


@pytest.mark.slow
def test_a_text_shorter_than_a_chunk_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcd " * 40)
    (tmp_path / "test.txt").write_text("efgh " * 7)
    settings = [o for o in TINY if not o.startswith(("data", "evals"))]
    given = (*settings, "data=text", f"data.root={tmp_path}", "data.length=16", "data.calibration_length=16")
    done = call(*given, "evals=[perplexity]", "evals.perplexity.length=40", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    name = f"{tmp_path.name}-validation"
    assert done.stderr.strip() == f"evals.perplexity.length=40: must be from 2 to 35, all tokens that {name} has"


def test_pages_without_a_heading_are_refused(composed: Compose, untrained: None, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("words without any heading \n" * 20)
    settings = [o for o in TINY if not o.startswith(("data", "evals"))]
    sizes = ("data.length=16", "data.calibration_length=16", "evals=[word_perplexity]", f"storage={tmp_path / 's'}")
    with pytest.raises(InputError, match="evals.word_perplexity: the documents of wikitext2-test hold no tokens"):
        run(composed(*settings, "data=wikitext2", f"data.root={tmp_path}", *sizes), tmp_path / "out")


@pytest.mark.parametrize("task", [LanguageModelling(50), QuestionAnswering(), Regression(), Classification(3)], ids=str)
def test_accuracy_knows_what_has_none(task) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    object.__setattr__(data, "task", task)
    if isinstance(task, Classification):
        return refuse_unmeasurable({"accuracy": Accuracy()}, model, data)
    with pytest.raises(InputError) as caught:
        refuse_unmeasurable({"accuracy": Accuracy(), "again": Accuracy(), "perplexity": Perplexity()}, model, data)
    first, second = str(caught.value).splitlines()
    assert first.startswith("evals=accuracy: data=handmade is scored by ") and "holds no text" in second


def test_metrics_that_check_nothing_are_welcome() -> None:
    model, samples = ADAPTERS["toy_images"]()

    class Bare:
        def measure(self, subjects):
            return []

    refuse_unmeasurable({"bare": Bare()}, model, bundle_of(samples))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose weights lie in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = llama(settings={**sizes, "max_position_embeddings": 64}, tokenizer="byte")
    model.network.save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    model.preprocessing.tokenizer.save_pretrained(folder)
    assert len(shards(folder)) > 2
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def without_two(folder: Path) -> str:
    first, *_, last = shards(folder)
    for path in (first, last):
        path.unlink()
    return f"must hold all .* files that model.safetensors.index.json names; missing: {first.name}, {last.name}"


def with_half_a_shard(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:40])
    return "cannot be loaded by transformers"


def with_half_an_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{ half")
    return "model.safetensors.index.json is damaged"


def with_a_larger_tokenizer(folder: Path) -> str:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["added_tokens"].append({**rules["added_tokens"][0], "id": 258, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return "its tokenizer has token ids up to 258, the embedding 258 rows; they don't belong together"


@pytest.mark.parametrize("damage", [without_two, with_half_a_shard, with_half_an_index, with_a_larger_tokenizer])
def test_damaged_checkpoints_are_refused(damage: Callable[[Path], str], sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    assert isinstance(llama(checkpoint=str(folder)), Llama), "whole, it loads"
    message = damage(folder)
    with pytest.raises(InputError, match=f"^model.checkpoint={folder}: {message}"):
        llama(checkpoint=str(folder))


def measured(protocol: str | None, tokens: str | None = None) -> Measurement:
    details = {key: value for key, value in (("protocol", protocol), ("token_hash", tokens)) if value is not None}
    return Measurement(4.0, "per token", details=details)


def test_dense_and_pruned_by_different_protocols_are_not_merged() -> None:
    record = Record("x", {}, 0, {})
    record.add([{"perplexity": measured("a@1", "t")}, {"perplexity": measured("a@1", "t")}])
    with pytest.raises(
        RunError, match="perplexity: dense and pruned don't compare: a@1, tokens t against a@2, tokens t"
    ):
        record.add([{"perplexity": measured("a@1", "t")}, {"perplexity": measured("a@2", "t")}])
    with pytest.raises(RunError, match="tokens t against a@1, tokens u"):
        record.add([{"perplexity": measured("a@1", "t")}, {"perplexity": measured("a@1", "u")}])
    ((*_, unit),) = rows(record.dense, record.pruned)
    assert unit == "per token, a@1"
