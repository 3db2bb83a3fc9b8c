"""Distillation: train what is left to answer like the dense model (Hinton et al., 2015, arXiv:1503.02531)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.checkpoint import load_model
from models.pretrained import nothing, rows_to_answer, samples_in, share_of
from prune.recovery.base import TrainedRecovery
from prune.recovery.teacher import refuse_misfit
from utils.errors import InputError
from utils.hooks import captured
from utils.rules import ExistingPath, NonNegative, Positive, Range


@dataclass(frozen=True, kw_only=True)
class Distill(TrainedRecovery):
    """`(1 - soft) * task loss + soft * divergence from the teacher + features * feature error`.

    Attributes:
        soft: Share of the teacher's logits in the loss.
        temperature: Softens both models' logits, T.
        features: Weight of the relative squared error at the model's feature points.
        teacher: Folder of a saved model that teaches; None takes the dense model.
    """

    soft: Annotated[float, Range(0, 1)] = 0.7
    temperature: Positive = 2.0
    features: NonNegative = 0.0
    teacher: ExistingPath | None = None

    @property
    def divides(self) -> bool:
        """Errors of features relate to those of the whole batch."""
        return self.features == 0

    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[..., Tensor]:
        """The blended loss; the teacher is in eval mode and without gradients.

        Raises:
            InputError: If the teacher can't run on the data, or answers in another form.
        """
        name = "the dense model"
        if self.teacher is not None:
            dense, name = load_model(self.teacher), f"recover.teacher={self.teacher}"
            dense.network.to(pruned.device)
        try:
            points = same_points(pruned, dense) if self.features else {}
        except ValueError as error:
            raise InputError(
                f"{name} has other feature points than the pruned model; recover.features must be 0"
            ) from error
        refuse_misfit(pruned, dense, data, points, name)

        def blended(batch: Batch, whole: Batch | None = None) -> Tensor:
            rows = rows_to_answer(batch, whole)
            placed = pruned.place(rows)
            with captured(pruned.network, points) as mine:
                logits = pruned.logits(placed)
            with torch.no_grad(), captured(dense.network, points.values()) as theirs:
                teacher = dense.logits(dense.place(rows))
            theirs = {point: theirs[name] for point, name in points.items()}
            loss, samples = nothing(logits), 1.0 if whole is None else samples_in(batch) / samples_in(whole)
            if share := share_of(data.task, batch, whole):
                loss = share * (1 - self.soft) * data.task.loss(logits, placed, self.label_smoothing)
            if samples:
                loss = loss + samples * self.soft * data.task.divergence(logits, teacher, self.temperature)
            return loss + self.features * feature_error(mine, theirs) if self.features else loss

        return blended

    def depends_on(self) -> dict[str, Any]:
        """The teacher's weights, where it is another one than the dense model."""
        return {"teacher": load_model(self.teacher).fingerprint()} if self.teacher is not None else {}


def same_points(pruned: PrunableModel, dense: PrunableModel) -> dict[str, str]:
    """Each feature point of a pruned model, and the dense model's for the same block; blocks may be gone."""
    mine, theirs = pruned.feature_points(), dense.feature_points()
    if len(pruned.block_origin) == len(dense.block_origin):
        return dict(zip(mine, theirs, strict=True))
    inside = [theirs[dense.block_origin.index(block)] for block in pruned.block_origin]
    return dict(zip(mine, [*inside, *theirs[len(dense.blocks()) :]], strict=True))


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
