"""Distillation: train what is left to answer like the dense model (Hinton et al., 2015, arXiv:1503.02531)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.recovery.base import TrainedRecovery
from utils.hooks import captured
from utils.rules import NonNegative, Positive, Range


@dataclass(frozen=True, kw_only=True)
class Distill(TrainedRecovery):
    """`(1 - soft) * task loss + soft * divergence from the teacher + features * feature error`.

    Attributes:
        soft: Share of the teacher's logits in the loss.
        temperature: Softens both models' logits, T.
        features: Weight of the relative squared error at the model's feature points.
    """

    soft: Annotated[float, Range(0, 1)] = 0.7
    temperature: Positive = 2.0
    features: NonNegative = 0.0

    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[[Batch], Tensor]:
        """The blended loss; the dense model is the teacher, in eval mode and without gradients."""

        def blended(batch: Batch) -> Tensor:
            placed = pruned.place(batch)
            with captured(pruned.network, self._points(pruned)) as mine:
                logits = pruned.logits(placed)
            with torch.no_grad(), captured(dense.network, self._points(dense)) as theirs:
                teacher = dense.logits(dense.place(batch))
            loss = (1 - self.soft) * data.task.loss(logits, placed, self.label_smoothing)
            loss = loss + self.soft * data.task.divergence(logits, teacher, self.temperature)
            return loss + self.features * feature_error(mine, theirs) if self.features else loss

        return blended

    def _points(self, model: PrunableModel) -> tuple[str, ...]:
        return model.feature_points() if self.features else ()


def feature_error(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Mean over feature points of `||s - t||^2 / ||t||^2`, a scalar.

    Args:
        student: Features by name, any shape.
        teacher: The same names and shapes.
    """
    errors = [
        (student[name].float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-12)
        for name, wanted in teacher.items()
    ]
    return torch.stack(errors).mean()
