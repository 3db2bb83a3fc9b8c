"""SQuAD 1.1 and 2.0: questions about paragraphs, from local files or the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.base import DataBundle, fingerprint_of
from data.hub import hub_rows
from data.long_text import refuse_long_text
from data.squad_answers import Question
from data.squad_task import QuestionAnswering
from data.squad_windows import windows_of
from data.tables import Layout, Row, read_rows
from data.text import (
    TextBatches,
    batch_of,
    calibration_sample,
    example_of,
    mean_tokens,
    text_preprocessing,
)
from utils.errors import InputError
from utils.plain_json import read_json
from utils.rules import Count, ExistingPath, Seed, Whole, checked

if TYPE_CHECKING:
    from models.base import PrunableModel

MOST_MISPLACED = 0.01
COLUMNS = ("question", "context", "answers")
FOLDERS = {
    "1.1": ("squad", "squad11", "squadv1", "squadv11", "plaintext"),
    "2.0": ("squadv2", "squadv20", "squad2", "squad20"),
}
HUB_NAMES = {"1.1": "rajpurkar/squad", "2.0": "rajpurkar/squad_v2"}


@checked
def squad(
    *,
    version: Literal["1.1", "2.0"] | float = "1.1",
    root: ExistingPath | None = None,
    head: Literal["question_answering"] = "question_answering",
    tokens: Count | None = None,
    max_tokens: Count = 384,
    stride: Count = 128,
    batch_size: Count = 32,
    calibration_batches: Whole = 16,
    calibration_batch_size: Count = 32,
    seed: Seed = 0,
) -> "SquadSource":
    """Choose a version; its texts are read when the model, and so the tokenizer, is there.

    Args:
        version: 1.1, or 2.0, where some questions have no answer.
        root: Folder with the files: the original json, the hub's parquet, or JSON lines.
            None: the hub's `rajpurkar/squad` or `rajpurkar/squad_v2`.
        head: Always the same; there for the model's configuration to refer to.
        tokens: Length of the sample that costs are stated for; None: the mean length of the
            calibration sample.
        max_tokens: Longer texts are split into windows of this length, the question included.
        stride: Tokens that neighbouring windows share.
        batch_size: Windows per training and validation batch.
        calibration_batches: Batches that scores are computed on, drawn from train.
        calibration_batch_size: Windows in each; part of the definition of a score.
        seed: Seeds the order of training and the calibration sample.

    Raises:
        InputError: If a value breaks its rule, or no validation files lie under `root`.
    """
    known = f"{float(version):.1f}" if str(version) in ("1.1", "2.0", "2") else ""
    if known not in FOLDERS:
        raise InputError(f"data.version={version}: must be 1.1 or 2.0")
    where = Path(root) if root else None
    source = SquadSource(
        known, where, tokens, max_tokens, stride, batch_size, calibration_batches, calibration_batch_size, seed
    )
    if where is not None:
        source.layout.demand(where, "validation")
    return source


@dataclass(frozen=True)
class SquadSource:
    """A version of SQuAD that waits for a tokenizer; see `squad` for the fields."""

    version: str
    root: Path | None
    tokens: int | None
    max_tokens: int
    stride: int
    batch_size: int
    calibration_batches: int
    calibration_batch_size: int
    seed: int

    @property
    def layout(self) -> Layout:
        """Where its files may lie."""
        own = f"-v{self.version}"
        held_out = (f"dev{own}", "dev", "validation", "val")
        return Layout(FOLDERS[self.version], {"train": (f"train{own}", "train"), "validation": held_out})

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Split the texts into windows of this model's tokens.

        Raises:
            InputError: If the model has no tokenizer, a file can't be used, or no text fits
                into a window.
        """
        tokenizer = text_preprocessing(model, "squad", self.max_tokens, self.tokens).tokenizer
        notes: list[str] = []
        train = windows_of(self._questions("train", notes), tokenizer, self.max_tokens, self.stride)
        validation = windows_of(self._questions("validation", notes), tokenizer, self.max_tokens, self.stride)
        pool, rows, borrowed = calibration_sample(
            train, validation, self.calibration_batches, self.calibration_batch_size, self.seed
        )
        calibration = [batch_of(pool, batch) for batch in rows]
        asked = [pool.windows[row].question for batch in rows for row in batch]
        return DataBundle(
            name=f"squad-{self.version}",
            domain="language",
            task=QuestionAnswering(
                f"squad/{self.version}", validation.questions, validation.windows, self.version == "2.0"
            ),
            calibration=calibration,
            train=TextBatches(train, self.batch_size, shuffle_seed=self.seed),
            train_samples=len(train),
            validation=TextBatches(validation, self.batch_size),
            example=example_of(pool.texts, asked, self.tokens or mean_tokens(calibration)),
            fingerprints={
                "train": fingerprint_of(train.fingerprint(), self.batch_size, self.seed),
                "calibration": fingerprint_of(*(t for b in calibration for name in sorted(b) for t in (name, b[name]))),
                "validation": fingerprint_of(validation.fingerprint(), self.batch_size),
            },
            notes=[*notes, *borrowed],
        )

    def _questions(self, split: str, notes: list[str]) -> list[Question]:
        """The questions of a split; none for a training split that is not there."""
        source = f"data=squad data.version={self.version}"
        if self.root is None:
            instead = "data.root=<folder with the original json, parquet or jsonl files>"
            rows = hub_rows(HUB_NAMES[self.version], None, split, COLUMNS, source, instead)
        else:
            files = (self.layout.demand if split == "validation" else self.layout.find)(self.root, split)
            source = f"data.root: {files[0]}" if files else source
            own = [path for path in files if path.name.endswith(f"-v{self.version}.json")]
            rows = [row for path in own for row in original_rows(path)] if own else read_rows(files, COLUMNS)[0]
        questions = [question_of(row, source) for row in rows]
        if split == "validation" and not questions:
            raise InputError(f"{source} must hold questions; there is none")
        _refuse_misplaced(questions, source, notes)
        if self.version == "1.1" and (bad := next((q for q in questions if not q.answers), None)):
            raise InputError(f"{source}: {bad.question!r} has no answer; questions without one need data.version=2.0")
        return questions


def _refuse_misplaced(questions: list[Question], source: str, notes: list[str]) -> None:
    """Note answers that do not lie where their start says, and refuse many: spans are learned from there."""
    answers = [(q, text, start) for q in questions for text, start in zip(q.answers, q.starts, strict=True)]
    wrong = [(q, text) for q, text, start in answers if q.context[start : start + len(text)] != text]
    if len(wrong) > MOST_MISPLACED * len(answers):
        question, text = wrong[0]
        raise InputError(
            f"{source}: {len(wrong)} of {len(answers)} answers do not lie at their answer_start, must be at most "
            f"{MOST_MISPLACED:.0%}; the first is {text!r} of {question.question!r}"
        )
    if wrong:
        notes.append(f"{len(wrong)} of {len(answers)} answers of {source} do not lie at their answer_start")


def original_rows(path: Path) -> list[Row]:
    """Rows of the nested json that SQuAD was published as.

    Raises:
        InputError: If it is anything else.
    """
    try:
        articles = read_json(path)["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        return [{**asked, "context": paragraph["context"]} for paragraph in paragraphs for asked in paragraph["qas"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"data.root: {path} must be SQuAD's own json: {type(error).__name__}: {error}") from error


def question_of(row: Row, source: str) -> Question:
    """A row in the hub's form (`answers` holds two lists) or the original one (a list of answers).

    Raises:
        InputError: If something is missing in it.
    """
    try:
        answers: Any = row["answers"]
        if isinstance(answers, dict):
            texts, starts = answers["text"], answers["answer_start"]
        else:
            texts, starts = [a["text"] for a in answers], [a["answer_start"] for a in answers]
        refuse_long_text(row["context"], source)
        return Question(row["question"].strip(), row["context"], tuple(texts), tuple(map(int, starts)))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        rule = "must have question, context and answers, each answer a text and an answer_start"
        raise InputError(f"{source}: each row {rule} ({type(error).__name__}: {error})") from error
