"""The task of marking an answer in a text: two logits a token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from data.base import Batch, Figure, Predictions, divergences
from data.squad_answers import Found, Question, Window, answer_of, best_answer, exact_match, overlap_f1
from evals.scores import standard_error


@dataclass(frozen=True)
class QuestionAnswering:
    """First and last token of an answer: logits (B, T, 2), `start` and `end` (B,).

    Position 0 stands for no answer. Batches may differ in T; padded positions never win.

    Attributes:
        name: What the task is called.
        questions: The validation questions.
        windows: The validation samples, in the order that `window` of a batch counts.
        may_be_empty: Whether some questions have no answer.
    """

    name: str = "question_answering"
    questions: Sequence[Question] = field(default=(), repr=False)
    windows: Sequence[Window] = field(default=(), repr=False)
    may_be_empty: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Overlap of words, and answers that are right to the letter."""
        return ("f1", "exact_match")

    @property
    def targets(self) -> tuple[str, ...]:
        """Positions of the answer, the sample's number, and which tokens are real."""
        return ("start", "end", "window", "attention_mask")

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the first and the last token, in nats; smoothed over real tokens."""
        real = batch["attention_mask"].bool()[..., None]
        surprise = -log_softmax(masked(logits, batch), dim=1)  # (B, T, 2)
        wanted = surprise.gather(1, _positions(batch)[:, None, :]).mean()
        if not label_smoothing:
            return wanted
        spread = (surprise.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)).mean()
        return (1 - label_smoothing) * wanted + label_smoothing * spread

    def weight(self, batch: Batch) -> int:
        """Its samples."""
        return len(batch["start"])

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """Exact match and F1 of words, means over the questions, as the official script counts them."""
        found: dict[int, list[Found]] = {}
        for logits, batch in predictions:
            for scores, number in zip(logits.float().cpu().numpy(), batch["window"].tolist(), strict=True):
                window = self.windows[number]
                found.setdefault(window.question, []).append(best_answer(window, scores[:, 0], scores[:, 1]))
        pairs = [(answer_of(self.questions[q], found[q], self.may_be_empty), self.questions[q]) for q in sorted(found)]
        exact = sum(exact_match(answer, question.answers) for answer, question in pairs) / len(pairs)
        words = sum(overlap_f1(answer, question.answers) for answer, question in pairs) / len(pairs)
        details = {"standard_error": standard_error(exact, len(pairs)), "samples": len(pairs)}
        return {"f1": Figure(words, {"samples": len(pairs)}), "exact_match": Figure(exact, details)}

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Whether the likeliest first and last token of each window are both right, (B,)."""
        likeliest = masked(logits, batch).argmax(dim=1)  # (B, 2)
        return {"span_accuracy": (likeliest == _positions(batch)).all(dim=1).float()}

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` over positions, the mean of both heads.

        Padded positions take part: what is compared is all that the teacher gives.
        """
        wanted, given = (
            log_softmax(logits.float().transpose(1, 2).flatten(0, 1) / temperature, dim=-1)  # (2B, T)
            for logits in (teacher, student)
        )
        return temperature**2 * kl_div(given, wanted, log_target=True, reduction="batchmean")

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """KL over real positions, of starts plus of ends, (..., B)."""
        new, old = masked(given, batch), masked(wanted, batch)
        return divergences(new, old, dim=-2).sum(dim=-1)

    def distributions(self, logits: Tensor, batch: Batch) -> Tensor:
        """Real positions of starts and of ends, (B, 2, T)."""
        return masked(logits, batch).transpose(1, 2)

    def misfit(self, logits: Tensor) -> str | None:
        """Refuse a head that does not give two numbers a token."""
        if logits.ndim == 3 and logits.shape[2] == 2:
            return None
        shape = ", ".join(["B", *map(str, logits.shape[1:])])
        return f"the model's logits have shape ({shape}), the data needs (B, T, 2): start and end of an answer"


def masked(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (B, T, 2) in float32, minus infinity where there is only padding."""
    return logits.float().masked_fill(~batch["attention_mask"].bool()[..., None], -torch.inf)


def _positions(batch: Batch) -> Tensor:
    return torch.stack((batch["start"], batch["end"]), dim=1)  # (B, 2)
