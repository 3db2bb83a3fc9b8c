"""From start and end logits to answers in words, and what the answers are worth: pure functions."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BEST = 20
LONGEST_ANSWER = 30
NULL_THRESHOLD = 0.0
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question, the text that it is about, and the answers that count.

    Attributes:
        question: The question.
        context: The text.
        answers: Right answers; none where the text holds no answer.
        starts: Where each begins in the text, in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Which part of which question's text a sample shows.

    Attributes:
        question: Its position among the questions.
        first: Position of the first token of the text in the sample.
        offsets: First character and the one after the last of each token of the text, (tokens, 2).
    """

    question: int
    first: int
    offsets: np.ndarray

    def span(self, answer: str, start: int) -> tuple[int, int]:
        """First and last token of an answer; (0, 0), the null answer, where the window cuts it off."""
        stop, firsts, lasts = start + len(answer), self.offsets[:, 0], self.offsets[:, 1]
        if not len(firsts) or start < firsts[0] or stop > lasts[-1]:
            return 0, 0
        first = int(np.searchsorted(firsts, start, side="right")) - 1
        last = int(np.searchsorted(lasts, stop, side="left"))
        return (self.first + first, self.first + last) if first <= last else (0, 0)


@dataclass(frozen=True)
class Found:
    """The best answer of some window, and how good no answer at all would be; sums of two logits."""

    score: float
    start: int
    stop: int
    null: float


def best_answer(window: Window, start: np.ndarray, end: np.ndarray) -> Found:
    """The best span of a window among its likeliest starts and ends.

    Args:
        window: Which tokens belong to the text.
        start: Logits of the first token, (T,).
        end: Logits of the last token, (T,).

    Returns:
        The span in characters of the text; a score of minus infinity where there is none.
    """
    null = float(start[0] + end[0])
    text = slice(window.first, window.first + len(window.offsets))
    starts, ends = (np.argsort(-logits[text], kind="stable")[:BEST] for logits in (start, end))
    length = ends[None, :] - starts[:, None] + 1  # (starts, ends)
    scores = start[text][starts][:, None] + end[text][ends][None, :]
    scores = np.where((length >= 1) & (length <= LONGEST_ANSWER), scores, -np.inf)
    if not np.isfinite(scores).any():
        return Found(-np.inf, 0, 0, null)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    first, last = starts[row], ends[column]
    return Found(float(scores[row, column]), int(window.offsets[first, 0]), int(window.offsets[last, 1]), null)


def answer_of(question: Question, found: Sequence[Found], may_be_empty: bool) -> str:
    """The answer in words over all windows of a question.

    Args:
        question: The question.
        found: The best span of each of its windows.
        may_be_empty: Whether no answer (an empty text) is an answer: where the least null
            score of the windows is above the best span's.
    """
    best = max(found, key=lambda one: one.score)
    if may_be_empty and min(one.null for one in found) - best.score > NULL_THRESHOLD:
        return ""
    return question.context[best.start : best.stop]


def normalized(text: str) -> str:
    """Small letters, no punctuation, no articles, single spaces: as the official script compares."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, wanted: Sequence[str]) -> float:
    """1 if the answer is one of those that count, else 0."""
    return float(any(normalized(answer) == normalized(text) for text in wanted or ("",)))


def overlap_f1(answer: str, wanted: Sequence[str]) -> float:
    """F1 of the words that the answer shares with the closest of those that count."""
    return max(_words_f1(normalized(answer).split(), normalized(text).split()) for text in wanted or ("",))


def _words_f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))
