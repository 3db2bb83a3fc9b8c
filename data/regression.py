"""The task of predicting one number a sample."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from data.base import Batch, Figure, Predictions
from evals.scores import pearson, spearman


@dataclass(frozen=True)
class Regression:
    """One number a sample: logits (B, 1), labels (B,) in float32.

    Attributes:
        name: What the task is called.
        metrics: `pearson` and `spearman` correlation, the one to quote first.
    """

    name: str = "regression"
    metrics: tuple[str, ...] = ("spearman", "pearson")

    loss_unit = "squared error"

    @property
    def targets(self) -> tuple[str, ...]:
        """The labels."""
        return ("labels",)

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error; label smoothing has no meaning here and is left out."""
        return mse_loss(logits.float().squeeze(-1), batch["labels"].float())

    def weight(self, batch: Batch) -> int:
        """Its samples."""
        return len(batch["labels"])

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """Correlations over the whole split."""
        pairs = [(logits.squeeze(-1).cpu(), batch["labels"].cpu()) for logits, batch in predictions]
        answers, labels = (torch.cat(column).double() for column in zip(*pairs, strict=True))
        scores = {"pearson": pearson, "spearman": spearman}
        return {name: Figure(scores[name](answers, labels), {"samples": len(labels)}) for name in self.metrics}

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Squared error of each sample, (B,)."""
        return {"squared_error": (logits.float().squeeze(-1) - batch["labels"].float()).square()}

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared difference of the predictions; a temperature has no meaning here."""
        return mse_loss(student.float(), teacher.float())

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """Squared difference of each sample's prediction, (..., B)."""
        return (given.float() - wanted.float()).square().sum(dim=-1)

    def misfit(self, logits: Tensor) -> str | None:
        """Refuse a head that gives more than one number."""
        if logits.ndim == 2 and logits.shape[1] == 1:
            return None
        shape = ", ".join(["B", *map(str, logits.shape[1:])])
        return f"the model's logits have shape ({shape}), the data has one number a sample"
