"""Text sources: layouts, labels, padding, windows, answers; on hand-written files and on the real ones."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

import utils.hub
from data.base import Classification, DataBundle
from data.glue import TASKS, glue
from data.regression import Regression
from data.squad import squad
from data.squad_answers import Found, Question, Window, answer_of, best_answer, exact_match, normalized, overlap_f1
from data.squad_task import QuestionAnswering
from data.tables import read_rows
from data.text import TextBatches, Texts, example_of, tokenizer_identity
from evals.scores import f1, matthews, spearman
from models.preprocessing import TextPreprocessing
from utils.check import find_problems
from utils.config import build
from utils.errors import InputError

DATA = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent / "../shared/data"))
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS: list[str] = [*SPECIAL, *"a b c d e f good bad who is where it in the city of paris lives x y z".split()]
CLASSES = {task: about.outputs for task, about in TASKS.items()}


def tiny_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    inner.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, **settings)


def model_of(labels: tuple[str, ...] = (), longest: int = 512, **settings: Any) -> Any:
    return SimpleNamespace(name="tiny", preprocessing=TextPreprocessing(tiny_tokenizer(**settings), longest, labels))


def bundle(task: str, root: Path | None, model: Any = None, **settings: Any) -> DataBundle:
    small = {"calibration_batches": 1, "calibration_batch_size": 1} | settings
    data = glue(task=task, classes=CLASSES[task], root=None if root is None else str(root), **small)  # type: ignore
    return data.prepare(model or model_of())


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def labels_of(batches: Any) -> list:
    return sorted(torch.cat([batch["labels"] for batch in batches]).tolist())


def words_of(batches: Any) -> list[str]:
    rows = [row[mask.bool()] for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    return [" ".join(WORDS[number] for number in row) for row in rows]


ORIGINAL = {
    "sst2": ("SST-2", "sentence\tlabel\n", 'a "b \t1\n', [1]),
    "cola": ("CoLA", "", "gj04\t0\t*\ta b\n", [0]),
    "mrpc": ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n", '1\t7\t8\t"a b\tc\r\n', [1]),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", "0\t1\t2\ta\tb\t0\n", [0]),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel\n", "0\ta\tb\tnot_entailment\n", [1]),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel\n", "0\ta\tb\tentailment\n", [0]),
    "stsb": ("STS-B", "index\tgenre\tsentence1\tsentence2\tscore\n", "0\tx\ta\tb\t2.5\n", [2.5]),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tlabel1\tgold_label\n", "0\ta\tb\tneutral\tcontradiction\n", [2]),
}


@pytest.mark.parametrize("task", ORIGINAL)
@pytest.mark.parametrize("inside", [True, False])
def test_the_original_files_of_every_task(tmp_path: Path, task: str, inside: bool) -> None:
    folder, header, line, wanted = ORIGINAL[task]
    write(tmp_path / folder / "train.tsv", header + line * 3)
    write(tmp_path / folder / ("dev_matched.tsv" if task == "mnli" else "dev.tsv"), header + line + "\n")
    data = bundle(task, tmp_path / folder if inside else tmp_path)
    assert (data.name, data.domain, data.train_samples, data.notes) == (f"glue-{task}", "language", 3, [])
    assert labels_of(data.validation) == wanted and labels_of(data.train) == wanted * 3
    sample = words_of(data.validation)[0]
    assert sample.count("[SEP]") == len(TASKS[task].texts)
    if task == "sst2":
        assert sample == "[CLS] a [UNK] b [SEP]", "a stray quote is a character, the space at the end is not"


def test_tasks_and_their_metrics(tmp_path: Path) -> None:
    wanted = {
        "mnli": ("accuracy",), "qqp": ("accuracy", "f1"), "qnli": ("accuracy",), "sst2": ("accuracy",),
        "stsb": ("spearman", "pearson"), "mrpc": ("accuracy", "f1"), "rte": ("accuracy",),
        "cola": ("matthews", "accuracy"),
    }  # fmt: skip
    for task, (folder, header, line, _) in ORIGINAL.items():
        write(tmp_path / folder / ("dev_matched.tsv" if task == "mnli" else "dev.tsv"), header + line)
        found = bundle(task, tmp_path).task
        kind = Regression if task == "stsb" else Classification
        assert isinstance(found, kind) and found.metrics == wanted[task] and found.name == f"glue/{task}"


def test_parquet_shards_and_json_lines(tmp_path: Path) -> None:
    hub, flat = tmp_path / "sst2", tmp_path / "flat"
    hub.mkdir()
    for shard, labels in enumerate([[0, 1], [1]]):
        frame = pandas.DataFrame({"sentence": ["a"] * len(labels), "label": labels, "idx": 0})
        frame.to_parquet(hub / f"train-0000{shard}-of-00002.parquet")
    pandas.DataFrame({"sentence": ["b"], "label": [1]}).to_parquet(hub / "validation-00000-of-00001.parquet")
    assert labels_of(bundle("sst2", tmp_path).train) == [0, 1, 1]
    (hub / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="every shard of train"):
        bundle("sst2", tmp_path)
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("neutral", 2, -1)]
    write(flat / "train.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    write(flat / "val_matched.json", json.dumps(rows[0]))
    data = bundle("mnli", flat)
    assert labels_of(data.train) == [1, 2] and labels_of(data.validation) == [1]
    assert data.notes == ["1 of 3 train samples have no label and are left out"]


def sst2(folder: Path, train: str = "a\t0\nb c\t1\n", dev: str = "c\t1\n") -> Path:
    write(folder / "train.tsv", "sentence\tlabel\n" + train)
    write(folder / "dev.tsv", "sentence\tlabel\n" + dev)
    return folder


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a\t0\tb\n", r"train.tsv line 2 has 3 fields; must be 2"),
        ("a\t0\n\nb\t1\n", r"train.tsv line 3 has 1 fields; must be 2"),
        ("a\t7\n", r"train.tsv: label '7' must be one of negative, positive or an index"),
        ("a\tneutral\n", r"label 'neutral' must be one of"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bundle("sst2", sst2(tmp_path, train=train))


def test_other_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no validation split.*dev.tsv, validation.tsv, val.tsv"):
        glue(task="sst2", classes=2, root=str(tmp_path))
    write(tmp_path / "dev.tsv", "text\tlabel\na\t1\n")
    with pytest.raises(InputError, match="dev.tsv must have a column sentence"):
        bundle("sst2", tmp_path)
    for text, message in (("\n", "is empty|no label|a column"), ("sentence\tlabel\n", "there is none")):
        write(tmp_path / "dev.tsv", text)
        with pytest.raises(InputError, match=message):
            bundle("sst2", tmp_path)
    with pytest.raises(InputError, match="bad.jsonl line 2 must be one JSON object"):
        read_rows([write(tmp_path / "bad.jsonl", '{"a": 1}\n[]\n')], {"a"})
    with pytest.raises(InputError, match="bad.parquet is no parquet file"):
        read_rows([write(tmp_path / "bad.parquet", "text")], {"a"})
    (tmp_path / "bad.tsv").write_bytes(b"a\n\xff\n")
    with pytest.raises(InputError, match="bad.tsv is not UTF-8"):
        read_rows([tmp_path / "bad.tsv"], {"a"})


def test_broken_lines_of_qqp_are_counted(tmp_path: Path) -> None:
    _, header, line, _ = ORIGINAL["qqp"]
    write(tmp_path / "train.tsv", header + line + "5\tcut\n" + line)
    write(tmp_path / "dev.tsv", header + line)
    data = bundle("qqp", tmp_path)
    assert data.train_samples == 2 and data.notes == ["1 broken lines of the train files are left out"]


def test_labels_follow_the_models_order(tmp_path: Path) -> None:
    header = "sentence1\tsentence2\tgold_label\n"
    lines = "a\tb\tentailment\na\tb\tneutral\na\tb\tneutral\na\tb\t-\n"
    write(tmp_path / "dev_matched.tsv", header + lines)
    plain = bundle("mnli", tmp_path, model_of(("LABEL_0", "LABEL_1", "LABEL_2")))
    assert labels_of(plain.validation) == [0, 1, 1] and not any("order" in note for note in plain.notes)
    assert any("1 of 4 validation samples have no label" in note for note in plain.notes)
    other = bundle("mnli", tmp_path, model_of(("CONTRADICTION", "Entailment", "neutral")))
    assert labels_of(other.validation) == [1, 2, 2]
    assert any("contradiction, entailment, neutral" in note for note in other.notes)
    assert plain.fingerprints["validation"] != other.fingerprints["validation"]
    _, header, line, _ = ORIGINAL["mrpc"]
    write(tmp_path / "mrpc" / "dev.tsv", header + line)
    turned = bundle("mrpc", tmp_path, model_of(("equivalent", "not equivalent")))
    assert labels_of(turned.validation) == [0] and turned.task.metrics == ("accuracy",)  # type: ignore[attr-defined]


def test_a_missing_train_split_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    data = bundle("sst2", tmp_path, calibration_batches=2)
    assert data.train_samples == len(data.train) == len(list(data.train)) == 0
    assert "calibration sample is of the validation split" in data.notes[0]
    assert sorted(words_of(data.calibration)) == sorted(words_of(data.validation))
    with pytest.raises(InputError, match="3 samples; must be between 1 and the 2 validation"):
        bundle("sst2", tmp_path, calibration_batches=3)


def many(folder: Path) -> Path:
    """Sentences of 1 to 20 words; those of train start with another word than those of validation."""
    lines = [" ".join(["b"] * (7 * k % 20)) + f"\t{k % 2}\n" for k in range(50)]
    return sst2(folder, "".join("a " + line for line in lines), "".join("c " + line for line in lines))


def test_batches_hold_every_sample_once_padded_to_the_longest(tmp_path: Path) -> None:
    data = bundle("sst2", many(tmp_path), batch_size=8, max_tokens=16)
    wanted = sorted(f"[CLS] c{' b' * min(7 * k % 20, 13)} [SEP]" for k in range(50))
    for _ in range(2):
        batches = list(data.validation)
        assert sorted(words_of(batches)) == wanted
    assert [len(batch["labels"]) for batch in batches] == [8] * 6 + [2]
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True), "the longest first"
    for batch, tokens in zip(batches, lengths, strict=True):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(tokens), max(tokens))
        assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
    assert [len(b["labels"]) for b in data.train] == [8] * 6 + [2] and len(data.train) == 7
    assert sorted(words_of(data.train)) == [text.replace("c", "a") for text in wanted]


def test_token_types_only_where_the_tokenizer_has_them() -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = Texts((["a", "a b"], ["c", "c d"]), {"labels": torch.zeros(2)}, tiny_tokenizer(model_input_names=names), 9)
    batch = next(iter(TextBatches(texts, 2)))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]


def test_epochs_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    def epochs(seed: int) -> list[list[str]]:
        torch.rand(1)
        train, found = bundle("sst2", many(tmp_path), seed=seed).train, []
        for epoch in (2, 1, 2):
            train.set_epoch(epoch)
            found.append(words_of(train))
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again and first[0] == first[2] != first[1] and other[0] != first[0]


def test_calibration_is_of_train_without_repeats(tmp_path: Path) -> None:
    data = bundle("sst2", many(tmp_path), calibration_batches=5, calibration_batch_size=10, max_tokens=64)
    drawn = words_of(data.calibration)
    assert sorted(drawn) == sorted(words_of(data.train)) and all(" a" in text for text in drawn)
    assert data.calibration[0]["input_ids"].shape[1] == data.calibration[0]["attention_mask"].sum(1).max()
    mean = sum(len(text.split()) for text in drawn) / 50
    assert data.example["input_ids"].shape == (1, round(mean))
    with pytest.raises(InputError, match="51 samples; must be between 1 and the 50 training samples"):
        bundle("sst2", many(tmp_path), calibration_batches=51)


def test_fingerprints_tell_splits_and_settings_apart(tmp_path: Path) -> None:
    first = bundle("sst2", many(tmp_path)).fingerprints
    assert first == bundle("sst2", many(tmp_path)).fingerprints, "the tokenizer's leftovers do not count"
    other_seed = bundle("sst2", many(tmp_path), seed=1).fingerprints
    assert other_seed["validation"] == first["validation"]
    assert other_seed["train"] != first["train"] and other_seed["calibration"] != first["calibration"]
    assert bundle("sst2", many(tmp_path), max_tokens=5).fingerprints["validation"] != first["validation"]
    sample = bundle("sst2", many(tmp_path), calibration_batch_size=2).fingerprints
    assert (sample["train"], sample["validation"]) == (first["train"], first["validation"])


@pytest.mark.parametrize("tokens", [3, 5, 9, 40, 200])
def test_the_example_has_exactly_its_tokens(tmp_path: Path, tokens: int) -> None:
    data = bundle("sst2", many(tmp_path), tokens=tokens, calibration_batch_size=10)
    ids = data.example["input_ids"]
    assert ids.shape == (1, tokens) and bool(data.example["attention_mask"].all())
    assert set(data.example) == {"input_ids", "attention_mask"}
    assert ids[0, 0] == 2 and ids[0, -1] == 3 and not (ids[0, 1:-1] < 4).any()


def test_an_example_of_pairs_keeps_both_texts() -> None:
    texts = Texts((["a", "a a"], ["b", "b b"]), {}, tiny_tokenizer(), 8)
    for tokens in (5, 7, 30):
        words = words_of([example_of(texts, [0, 1], tokens)])[0]
        assert len(words.split()) == tokens and words.count("[SEP]") == 2 and " a" in words and " b" in words
    with pytest.raises(InputError, match="data.tokens=4: must be at least 5"):
        example_of(texts, [0], 4)


def test_the_tokenizers_identity_is_what_it_does() -> None:
    first, used, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    used(["a b c"], truncation=True, max_length=4, padding="max_length")
    other.add_tokens(["new"])
    assert tokenizer_identity(first) == tokenizer_identity(used) != tokenizer_identity(other)


def test_models_and_settings_that_do_not_fit(tmp_path: Path) -> None:
    root = sst2(tmp_path)
    with pytest.raises(InputError, match="data=glue needs a model with a tokenizer; model=toy has none"):
        bundle("sst2", root, SimpleNamespace(name="toy", preprocessing=None))
    with pytest.raises(InputError, match="data.max_tokens=64: must be at most 32"):
        bundle("sst2", root, model_of(longest=32))
    with pytest.raises(InputError, match="data.tokens=99: must be at most 64"):
        bundle("sst2", root, model_of(longest=64), tokens=99)
    without = model_of()
    without.preprocessing.tokenizer.pad_token = None
    with pytest.raises(InputError, match="needs a tokenizer with a padding token"):
        bundle("sst2", root, without)
    with pytest.raises(InputError, match="data.classes=5: must be 2; data.task=sst2 has 2 labels"):
        glue(task="sst2", classes=5, root=str(root))
    with pytest.raises(InputError, match="data.classes=2: must be 1; data.task=stsb is one number"):
        glue(task="stsb", classes=2)


def test_without_the_hub_one_message_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    # the library itself believes that it is online, as it does on a machine that lost its network
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(InputError, match="data=glue data.task=rte: is not on this machine.*data.root=<folder with the"):
        bundle("rte", None)
    with pytest.raises(InputError, match="data=squad data.version=2.0: is not on this machine"):
        squad(version=2.0).prepare(model_of())
    assert time.monotonic() - start < 15 and datasets.config.HF_HUB_OFFLINE is False


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import datasets.config

    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def load(name: str, config: str, split: str) -> datasets.Dataset:
        assert datasets.config.HF_HUB_OFFLINE, "the cache is asked first, without a wait for the network"
        asked.append((name, config, split))
        rows = {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [0]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert labels_of(bundle("mnli", None).validation) == [2]
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the library's own")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(utils.hub, "reachable", lambda: True)
    with pytest.raises(InputError, match="refuses it: RuntimeError: the library's own"):
        bundle("mnli", None)


def test_the_configurations_compose(composed: Any, tmp_path: Path) -> None:
    for task, classes in CLASSES.items():
        cfg = composed("data=glue", f"data.task={task}")
        assert cfg.data.classes == classes
        assert not [problem for problem in find_problems(cfg) if problem.startswith("data")]
    for version in ("1.1", "2.0", "'2.0'"):
        cfg = composed("data=squad", f"data.version={version}")
        assert not [problem for problem in find_problems(cfg) if problem.startswith("data")]
        assert build(cfg.data).version == version.strip("'")
    with pytest.raises(InputError, match="data.version=3.0: must be 1.1 or 2.0"):
        squad(version=3.0)


def test_scores_by_hand() -> None:
    answers, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert f1(answers, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2 found, 1 false, 1 missed
    assert matthews(answers, labels) == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


# SQuAD

CONTEXT = "a b c d e f x y z a b c in the city of paris lives it"


def asked(number: str, question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    held = {"text": list(answers), "answer_start": starts}
    return {"id": number, "question": question, "context": context, "answers": held}


ASKED = [asked("1", " who is ", CONTEXT, "paris"), asked("2", "where", "the city of paris", "the city")]
NULL = asked("3", "who", "x y z")  # no articles: an answer of nothing else reads as none


def write_squad(folder: Path, rows: list[dict], layout: str, version: str = "1.1") -> Path:
    for split in ("train", "dev"):
        if layout == "original":
            nested = [
                {
                    "context": row["context"],
                    "qas": [
                        {
                            **{key: row[key] for key in ("id", "question")},
                            "answers": [
                                {"text": text, "answer_start": start}
                                for text, start in zip(*row["answers"].values(), strict=True)
                            ],
                        }
                    ],
                }
                for row in rows
            ]
            text = json.dumps({"version": version, "data": [{"title": "t", "paragraphs": nested}]})
            write(folder / f"{split}-v{version}.json", text)
        elif layout == "jsonl":
            write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            own = folder / ("plain_text" if version == "1.1" else "squad_v2")
            own.mkdir(exist_ok=True)
            name = "train" if split == "train" else "validation"
            pandas.DataFrame(rows).to_parquet(own / f"{name}-00000-of-00001.parquet")
    return folder


def squad_bundle(folder: Path, version: str | float = "1.1", model: Any = None, **settings: Any) -> DataBundle:
    small = {"max_tokens": 14, "stride": 3, "calibration_batches": 1, "calibration_batch_size": 2, "batch_size": 2}
    return squad(version=version, root=str(folder), **(small | settings)).prepare(model or model_of())  # type: ignore


@pytest.mark.parametrize("layout", ["original", "jsonl", "parquet"])
@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_squad_layouts_give_the_same_windows(tmp_path: Path, layout: str, version: str) -> None:
    rows = ASKED if version == "1.1" else [*ASKED, NULL]
    data = squad_bundle(write_squad(tmp_path, rows, layout, version), float(version))
    assert data.name == f"squad-{version}" and isinstance(data.task, QuestionAnswering)
    windows = {int(n): (words, int(s), int(e)) for b in data.validation for words, n, s, e in zip(
        words_of([b]), b["window"], b["start"], b["end"], strict=True)}  # fmt: skip
    long = [words for words, _, _ in windows.values() if words.startswith("[CLS] who is [SEP]")]
    assert all(len(words.split()) <= 14 for words in long)
    for number, (words, start, end) in windows.items():
        window = data.task.windows[number]
        answers = data.task.questions[window.question].answers
        shown = " ".join(words.split()[start : end + 1])
        if answers and f" {answers[0]} " in words:
            assert shown == answers[0]
        else:
            assert (start, end, shown) == (0, 0, "[CLS]")
    assert len(long) == 3 and sum("paris" in words for words in long) == 1
    assert data.train_samples == len(windows) == len(rows) + 2


def logits_for(data: DataBundle, marked: dict[str, tuple[str, str, float]], null: float = 0.0) -> list:
    """Logits that give the first and last word named for a question their own height, and position 0 `null`."""
    task, found = data.task, []
    assert isinstance(task, QuestionAnswering)
    for batch in data.validation:
        logits = torch.full((*batch["input_ids"].shape, 2), -5.0)
        logits[:, 0] = null
        logits[batch["attention_mask"] == 0] = 99.0  # padding must never win
        logits[batch["input_ids"] == WORDS.index("[SEP]")] = 50.0  # nor what is no text
        for row, number in enumerate(batch["window"].tolist()):
            window = task.windows[number]
            question = task.questions[window.question].question
            if question in marked:
                first, last, height = marked[question]
                text = torch.arange(batch["input_ids"].shape[1])
                own = (text >= window.first) & (text < window.first + len(window.offsets))
                for side, word in enumerate((first, last)):
                    logits[row, (batch["input_ids"][row] == WORDS.index(word)) & own, side] = height
        found.append((logits, {name: batch[name] for name in task.targets}))
    assert len({logits.shape[1] for logits, _ in found}) > 1, "batches of several lengths"
    return found


def test_answers_over_windows_by_hand(tmp_path: Path) -> None:
    data = squad_bundle(write_squad(tmp_path, ASKED, "jsonl"))
    right = data.task.figures(logits_for(data, {"who is": ("paris", "paris", 5.0), "where": ("the", "city", 5.0)}))
    assert {name: figure.value for name, figure in right.items()} == {"exact_match": 1.0, "f1": 1.0}
    half = data.task.figures(logits_for(data, {"who is": ("x", "z", 5.0), "where": ("city", "paris", 5.0)}))
    # nothing of `paris`; `city of paris` against `city` shares one word of three and one
    assert half["exact_match"].value == 0 and half["f1"].value == pytest.approx((0 + 0.5) / 2)
    assert half["f1"].details["samples"] == 2
    null = data.task.figures(logits_for(data, {"who is": ("paris", "paris", 5.0), "where": ("the", "city", 5.0)}, 90))
    assert null["exact_match"].value == 1.0, "in 1.1 every question has an answer"


def test_null_answers_of_version_2(tmp_path: Path) -> None:
    data = squad_bundle(write_squad(tmp_path, [*ASKED, NULL], "jsonl", "2.0"), "2.0")
    marks = {"who is": ("paris", "paris", 5.0), "where": ("the", "city", 5.0)}
    for null, wanted in ((0.0, 1.0), (4.9, 1.0), (5.1, 1 / 3), (-6.0, 2 / 3)):
        found = data.task.figures(logits_for(data, marks, null))
        assert found["exact_match"].value == pytest.approx(wanted), null
    assert found["f1"].value == pytest.approx(2 / 3)


def test_the_least_null_score_of_all_windows_counts() -> None:
    question = Question("who", "x y z", (), ())
    windows = [Found(4.0, 0, 1, null=9.0), Found(6.0, 2, 3, null=5.0)]
    assert answer_of(question, windows, may_be_empty=True) == "y"
    windows[1] = Found(6.0, 2, 3, null=6.5)
    assert answer_of(question, windows, may_be_empty=True) == ""
    assert answer_of(question, windows, may_be_empty=False) == "y"


def test_what_counts_as_the_same_answer() -> None:
    assert normalized("  The  U.S. Army, an army!") == "us army army"
    assert exact_match("The Cat!", ("dog", "cat")) == 1 and exact_match("cats", ("cat",)) == 0
    assert exact_match("", ()) == 1 and exact_match("cat", ()) == 0 and overlap_f1("cat", ()) == 0
    assert overlap_f1("the big big cat", ("big cat",)) == pytest.approx(0.8)  # 2 of 3 and 2 of 2
    assert overlap_f1("dog", ("cat", "a dog")) == 1 and overlap_f1("", ("cat",)) == 0


def test_answers_are_at_most_30_tokens_and_never_backwards() -> None:
    window = Window(0, 2, np.array([[k, k + 1] for k in range(60)]))
    start, end = np.zeros(64), np.zeros(64)
    start[12], end[7], end[41], end[42] = 9, 9, 5, 8
    found = best_answer(window, start, end)
    assert (found.start, found.stop, found.score) == (10, 40, 14.0), "30 tokens; the better end is one too far"


def test_question_answering_loss_leaves_padding_out() -> None:
    task = QuestionAnswering()
    logits = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    batch = {
        "start": torch.tensor([1, 0]),
        "end": torch.tensor([2, 5]),
        "attention_mask": mask,
        "window": torch.arange(2),
    }
    for smoothing in (0.0, 0.1):

        def one(row: int, length: int, smoothing: float = smoothing) -> torch.Tensor:
            heads = zip(logits[row, :length].T, (batch["start"][row], batch["end"][row]), strict=True)
            return torch.stack([cross_entropy(head, at, label_smoothing=smoothing) for head, at in heads]).mean()

        wanted = (one(0, 4) + one(1, 6)) / 2
        assert torch.allclose(task.loss(logits, batch, smoothing), wanted)
    logits[0, 4:] = 100.0
    logits[0, 1, 0], logits[0, 2, 1], logits[1, 3] = 50, 50, 50
    assert task.quality(logits, batch)["span_accuracy"].tolist() == [1, 0]
    assert float(task.divergence(logits, logits, 2.0)) == 0
    heads = [torch.distributions.Categorical(logits=torch.randn(2, 6)) for _ in range(2)]
    pair = torch.stack([heads[0].logits, heads[0].logits], -1), torch.stack([heads[1].logits, heads[1].logits], -1)
    wanted = torch.distributions.kl_divergence(heads[1], heads[0]).mean()
    assert torch.allclose(task.divergence(*pair, 1.0), wanted)
    assert task.misfit(logits) is None and "(B, 2)" in str(task.misfit(logits[:, 0]))


def test_squad_examples_padding_and_refusals(tmp_path: Path) -> None:
    root = write_squad(tmp_path, ASKED, "jsonl")
    left = squad_bundle(root, model=model_of(padding_side="left"), tokens=12)
    assert all(bool(batch["attention_mask"][:, 0].all()) for batch in left.validation), "positions count from the left"
    assert left.example["input_ids"].shape == (1, 12) and bool(left.example["attention_mask"].all())
    assert set(left.example) == {"input_ids", "attention_mask"}
    with pytest.raises(InputError, match="data.stride=9: must be below 9, the tokens of text that data.max_tokens=14"):
        squad_bundle(root, stride=9)
    with pytest.raises(InputError, match="data=squad needs a model with a tokenizer; model=toy has none"):
        squad_bundle(root, model=SimpleNamespace(name="toy", preprocessing=None))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no validation split"):
        squad(version="2.0", root=str(empty))
    with pytest.raises(InputError, match="'who' has no answer; questions without one need data.version=2.0"):
        squad_bundle(write_squad(tmp_path / "null", [NULL], "jsonl"))
    write(tmp_path / "bad" / "dev-v1.1.json", '{"data": [{}]}')
    with pytest.raises(InputError, match="must be SQuAD's own json: KeyError"):
        squad_bundle(tmp_path / "bad")


# the real files


@pytest.mark.skipif(not (DATA / "glue").is_dir(), reason="no GLUE files (PARE_DATA)")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("sst2", 67349, 872), ("cola", 8551, 1043), ("rte", 2490, 277), ("stsb", 5749, 1500), ("mrpc", 3668, 408),
     pytest.param("qnli", 0, 5463, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_real_files(task: str, train: int, validation: int) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "tokenizers" / "bert-base-uncased" / "tokenizer.json"), pad_token="[PAD]"
    )
    model: Any = SimpleNamespace(name="bert", preprocessing=TextPreprocessing(own, 512))
    data = bundle(task, DATA / "glue", model, calibration_batches=4, calibration_batch_size=8)
    assert data.train_samples == train and len(labels_of(data.validation)) == validation
    assert len(data.notes) == (not train)
    labels = labels_of(data.validation)
    assert (min(labels), max(labels)) == ((0, 5) if task == "stsb" else (0, 1))
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in data.validation)
    tokens = sum(batch["attention_mask"].numel() for batch in data.validation)
    assert padding / tokens < 0.1, "samples of like length share a batch"
    assert 5 < data.example["input_ids"].shape[1] < 100


def test_squad_answers_that_lie_elsewhere_are_noted_or_refused(tmp_path: Path) -> None:
    rows = [{**row, "answers": dict(row["answers"])} for row in ASKED * 120]
    rows[0]["answers"] = {"text": rows[0]["answers"]["text"], "answer_start": [0 for _ in rows[0]["answers"]["text"]]}
    whole = [
        text
        for text, start in zip(*rows[0]["answers"].values(), strict=True)
        if rows[0]["context"][start:].startswith(text)
    ]
    assert not whole, "the answer must not lie at the start"
    [*_, note] = squad_bundle(write_squad(tmp_path / "few", rows, "jsonl")).notes
    assert "do not lie at their answer_start" in note
    for row in rows[:30]:
        row["answers"] = rows[0]["answers"] | {"text": ["nowhere in it"] * len(rows[0]["answers"]["text"])}
    with pytest.raises(InputError, match="do not lie at their answer_start, must be at most 1%"):
        squad_bundle(write_squad(tmp_path / "many", rows, "jsonl"))
