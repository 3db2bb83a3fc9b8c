"""Long texts as overlapping windows, each beside its question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.base import Batch, fingerprint_of
from data.squad_answers import Question, Window
from data.text import INPUTS, Texts, tokenizer_identity
from utils.errors import InputError
from utils.progress import progress_bar

QUESTION_TOKENS = 64  # as in BERT's own code; longer questions are cut, so that text fits beside them
QUESTIONS_AT_ONCE = 500


@dataclass(frozen=True)
class Windows:
    """Samples of a question and the part of its text that fits beside it.

    Attributes:
        questions: The questions.
        windows: Which part of which question's text each sample shows.
        inputs: Unpadded model inputs, by name one int32 array a sample.
        targets: `start`, `end` and `window`, (N,).
        tokenizer: The tokenizer that pads them.
        max_tokens: Length of the longest sample there may be.
        stride: Tokens that neighbouring windows share.
    """

    questions: Sequence[Question]
    windows: Sequence[Window]
    inputs: dict[str, list[np.ndarray]]
    targets: Batch
    tokenizer: Any
    max_tokens: int
    stride: int

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def padding_side(self) -> str:
        """Right, whatever the tokenizer does elsewhere: positions count from the left."""
        return "right"

    def encoded(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Model inputs of some samples."""
        return {name: [arrays[row].tolist() for row in rows] for name, arrays in self.inputs.items()}

    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [len(ids) for ids in self.inputs["input_ids"]]

    @property
    def texts(self) -> Texts:
        """Each question with the whole of its text, as a pair."""
        pair = [q.question for q in self.questions], [q.context for q in self.questions]
        return Texts(pair, {}, self.tokenizer, self.max_tokens)

    def fingerprint(self) -> str:
        """Hash of the questions, their answers, and how they are tokenised and split."""
        answers = (str((q.answers, q.starts)) for q in self.questions)
        return fingerprint_of(self.texts.fingerprint(), *answers, tokenizer_identity(self.tokenizer), self.stride)


def windows_of(questions: Sequence[Question], tokenizer: Any, max_tokens: int, stride: int) -> Windows:
    """Split each question's text into overlapping windows.

    Args:
        questions: The questions.
        tokenizer: A fast tokenizer of transformers.
        max_tokens: Longest sample, question and special tokens included.
        stride: Tokens that neighbouring windows share.

    Raises:
        InputError: If the windows would not move on along the text.
    """
    windows: list[Window] = []
    inputs: dict[str, list[np.ndarray]] = {}
    spans: list[tuple[int, int]] = []
    parts = range(0, len(questions), QUESTIONS_AT_ONCE)
    with progress_bar("split texts into windows", len(parts)) as advance:
        for first in parts:
            part = questions[first : first + QUESTIONS_AT_ONCE]
            found = _tokenized(part, tokenizer, max_tokens, stride)
            for name in (name for name in INPUTS if name in found):
                inputs.setdefault(name, []).extend(np.array(ids, dtype=np.int32) for ids in found[name])
            for row, number in enumerate(found["overflow_to_sample_mapping"]):
                window, question = _window(found, row, first + number), part[number]
                windows.append(window)
                spans.append(window.span(question.answers[0], question.starts[0]) if question.answers else (0, 0))
            advance("")
    places = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    targets = {"start": places[:, 0], "end": places[:, 1], "window": torch.arange(len(windows))}
    return Windows(questions, windows, inputs, targets, tokenizer, max_tokens, stride)


def _window(found: Any, row: int, question: int) -> Window:
    sides = found.sequence_ids(row)
    own = [place for place, side in enumerate(sides) if side == 1]
    first = own[0] if own else 0
    offsets = np.array(found["offset_mapping"][row][first : first + len(own)], dtype=np.int32).reshape(-1, 2)
    return Window(question, first, offsets)


def _tokenized(questions: Sequence[Question], tokenizer: Any, max_tokens: int, stride: int) -> Any:
    asked = [q.question for q in questions]
    found = tokenizer(
        asked, add_special_tokens=False, truncation=True, max_length=QUESTION_TOKENS, return_offsets_mapping=True
    )
    asked = [text[: ends[-1][1]] if ends else text for text, ends in zip(asked, found["offset_mapping"], strict=True)]
    longest = max(len(ids) for ids in tokenizer(asked, add_special_tokens=False)["input_ids"])
    room = max_tokens - longest - tokenizer.num_special_tokens_to_add(pair=True)
    # the tokenizer itself would end the process here
    if stride >= room:
        raise InputError(
            f"data.stride={stride}: must be below {room}, the tokens of text that data.max_tokens={max_tokens} leaves "
            f"beside the longest question"
        )
    return tokenizer(
        asked, [q.context for q in questions], truncation="only_second", max_length=max_tokens, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_attention_mask=True,
    )  # fmt: skip
