"""GLUE: eight of its tasks (not WNLI, which is hardly used), from local files or the Hugging Face hub."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from data.base import Classification, DataBundle, Task, fingerprint_of
from data.hub import hub_rows
from data.regression import Regression
from data.tables import Layout, Row, first_column, read_rows, text_of
from data.text import TextBatches, Texts, batch_of, calibration_sample, example_of, mean_tokens, text_preprocessing
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Seed, Whole, checked

if TYPE_CHECKING:
    from models.base import PrunableModel

LABEL_COLUMNS = ("gold_label", "label", "is_duplicate", "Quality", "score")
UNLABELLED = ("", "-", "-1", "-1.0", "None", "nan")
BROKEN_LINES = {"qqp": 10}  # the original QQP files hold a few lines that were cut in two
LARGEST_SCORE = 5.0


@dataclass(frozen=True)
class GlueTask:
    """One of the tasks.

    Attributes:
        texts: Per text of a sample the names that its column may have.
        labels: Names in the hub's order; empty where the label is a number.
        metrics: What it is scored by, the one to quote first.
        header: Names of a tsv's columns where the file has none.
        max_tokens: Length that samples are truncated to unless told otherwise.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    max_tokens: int = 128

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a sample."""
        return len(self.labels) or 1


PAIR = (("sentence1", "#1 String", "premise"), ("sentence2", "#2 String", "hypothesis"))
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "mnli": GlueTask(PAIR, ("entailment", "neutral", "contradiction")),
    "qqp": GlueTask((("question1",), ("question2",)), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "qnli": GlueTask((("question",), ("sentence",)), ENTAILMENT),
    "sst2": GlueTask((("sentence",),), ("negative", "positive"), max_tokens=64),
    "stsb": GlueTask(PAIR, (), ("spearman", "pearson")),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "rte": GlueTask(PAIR, ENTAILMENT),
    "cola": GlueTask(
        (("sentence",),), ("unacceptable", "acceptable"), ("matthews", "accuracy"),
        header=("source", "label", "star", "sentence"), max_tokens=64,
    ),
}  # fmt: skip


@checked
def glue(
    *,
    task: Literal["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"],
    classes: Count,
    root: ExistingPath | None = None,
    tokens: Count | None = None,
    max_tokens: Count | None = None,
    batch_size: Count = 32,
    calibration_batches: Whole = 16,
    calibration_batch_size: Count = 32,
    seed: Seed = 0,
    classes_by_task: Mapping[str, Any] | None = None,
) -> "GlueSource":
    """Choose a task; its texts are read when the model, and so the tokenizer, is there.

    Args:
        task: Which one. MNLI is validated on its matched part.
        classes: Labels of the task, 1 for STS-B; there for the model's configuration to refer to.
        root: Folder with the task's files, or with a folder a task: the original tsv, the
            hub's parquet, or JSON lines. None: the hub's `nyu-mll/glue`.
        tokens: Length of the sample that costs are stated for; None: the mean length of the
            calibration sample.
        max_tokens: Longer samples are truncated; None: 64 for SST-2 and CoLA, else 128.
        batch_size: Samples per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Samples in each; part of the definition of a score.
        seed: Seeds the order of training and the calibration sample.
        classes_by_task: Where the configuration looks `classes` up; not used here.

    Raises:
        InputError: If a value breaks its rule, or no validation files lie under `root`.
    """
    outputs, most = TASKS[task].outputs, max_tokens or TASKS[task].max_tokens
    if classes != outputs:
        has = f"has {outputs} labels" if TASKS[task].labels else "is one number a sample"
        raise InputError(f"data.classes={classes}: must be {outputs}; data.task={task} {has}")
    source = GlueSource(
        task, Path(root) if root else None, tokens, most, batch_size, calibration_batches, calibration_batch_size, seed
    )
    if source.root is not None:
        source.layout.demand(source.root, "validation")
    return source


@dataclass(frozen=True)
class GlueSource:
    """A task of GLUE that waits for a tokenizer; see `glue` for the fields."""

    task: str
    root: Path | None
    tokens: int | None
    max_tokens: int
    batch_size: int
    calibration_batches: int
    calibration_batch_size: int
    seed: int

    @property
    def layout(self) -> Layout:
        """Where its files may lie."""
        tail = "_matched" if self.task == "mnli" else ""
        held_out = tuple(name + tail for name in ("dev", "validation", "val"))
        return Layout((self.task,), {"train": ("train",), "validation": held_out})

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Read the texts for this model's tokenizer.

        Raises:
            InputError: If the model has no tokenizer, or a file can't be used.
        """
        own = text_preprocessing(model, "glue", self.max_tokens, self.tokens)
        order, notes = label_order(TASKS[self.task].labels, own.labels)
        train = self._texts("train", order, own.tokenizer, notes)
        validation = self._texts("validation", order, own.tokenizer, notes)
        pool, rows, borrowed = calibration_sample(
            train, validation, self.calibration_batches, self.calibration_batch_size, self.seed
        )
        calibration = [batch_of(pool, batch) for batch in rows]
        return DataBundle(
            name=f"glue-{self.task}",
            domain="language",
            task=self._scored(order, notes),
            calibration=calibration,
            train=TextBatches(train, self.batch_size, shuffle_seed=self.seed),
            train_samples=len(train),
            validation=TextBatches(validation, self.batch_size),
            example=example_of(pool, [row for batch in rows for row in batch], self.tokens or mean_tokens(calibration)),
            fingerprints={
                "train": fingerprint_of(train.fingerprint(), self.batch_size, self.seed),
                "calibration": fingerprint_of(*(t for b in calibration for name in sorted(b) for t in (name, b[name]))),
                "validation": fingerprint_of(validation.fingerprint(), self.batch_size),
            },
            notes=[*notes, *borrowed],
        )

    def _scored(self, order: Sequence[int], notes: list[str]) -> Task:
        name, metrics = f"glue/{self.task}", TASKS[self.task].metrics
        if not order:
            return Regression(name, metrics)
        if "f1" in metrics and list(order) != [0, 1]:
            notes.append("F1 is left out: its positive label is the model's first output, not its second")
            metrics = tuple(metric for metric in metrics if metric != "f1")
        return Classification(len(order), name, metrics)

    def _texts(self, split: str, order: Sequence[int], tokenizer: Any, notes: list[str]) -> Texts:
        rows, source = self._rows(split, notes)
        columns = [first_column(rows, names, source) for names in TASKS[self.task].texts]
        label = first_column(rows, LABEL_COLUMNS, source)
        numbers = [label_of(row.get(label), TASKS[self.task].labels, source) for row in rows]
        kept = [(row, number) for row, number in zip(rows, numbers, strict=True) if number is not None]
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept)} of {len(rows)} {split} samples have no label and are left out")
        if rows and not kept or split == "validation" and not rows:
            raise InputError(f"{source} must hold samples with labels; there is none")
        texts = tuple([text_of(row, column, source) for row, _ in kept] for column in columns)
        answers = [order[int(number)] if order else number for _, number in kept]
        labels = torch.tensor(answers, dtype=torch.int64 if order else torch.float32)
        return Texts(texts, {"labels": labels}, tokenizer, self.max_tokens)

    def _rows(self, split: str, notes: list[str]) -> tuple[list[Row], str]:
        """The rows of a split, and what to call their source; none for a training split that is not there."""
        about = TASKS[self.task]
        keep = {name for names in (*about.texts, LABEL_COLUMNS) for name in names}
        if self.root is None:
            what, instead = (
                f"data=glue data.task={self.task}",
                "data.root=<folder with the task's tsv, parquet or jsonl files>",
            )
            hub_split = "validation_matched" if (self.task, split) == ("mnli", "validation") else split
            return hub_rows("nyu-mll/glue", self.task, hub_split, keep, what, instead), what
        find = self.layout.demand if split == "validation" else self.layout.find
        files = find(self.root, split)
        rows, broken = read_rows(files, keep, about.header, BROKEN_LINES.get(self.task, 0))
        if broken:
            notes.append(f"{broken} broken lines of the {split} files are left out")
        return rows, f"data.root: {files[0] if files else self.root}"


def label_of(value: Any, names: Sequence[str], source: str) -> float | None:
    """A label as a number: an index into `names`, or a score from 0 to 5 where there are none.

    Returns:
        The number, or None where the sample has no label.

    Raises:
        InputError: If it is neither one of the names nor such a number.
    """
    text = str(value).strip()
    if text in UNLABELLED:
        return None
    if text in names:
        return names.index(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 <= number <= LARGEST_SCORE if not names else number in range(len(names))):
        rule = f"one of {', '.join(names)} or an index into them" if names else f"from 0 to {LARGEST_SCORE:g}"
        raise InputError(f"{source}: label {text!r} must be {rule}")
    return number


def label_order(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[str]]:
    """Which output of the model stands for each of the task's labels.

    Args:
        ours: The task's label names in the hub's order.
        theirs: Names of the model's outputs; they count only where they are the same names.

    Returns:
        Output per label, and a note if that is not the order of the labels.
    """
    names = ["_".join(name.lower().replace("-", " ").split()) for name in theirs]
    if sorted(names) != sorted(ours) or names == list(ours):
        return list(range(len(ours))), []
    return [names.index(name) for name in ours], [f"labels follow the model's order of outputs: {', '.join(names)}"]
