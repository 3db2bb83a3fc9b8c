"""Whether one model can teach another: both must answer a sample in the same shapes."""

from collections.abc import Mapping, Sequence

import torch

from data.base import DataBundle
from models.base import PrunableModel
from utils.errors import InputError
from utils.hooks import captured

Shapes = dict[str, tuple[int, ...]]


@torch.no_grad()
def refuse_misfit(
    pruned: PrunableModel, teacher: PrunableModel, data: DataBundle, points: Mapping[str, str], name: str
) -> None:
    """Raise an InputError unless logits, and features that are compared, have the same shapes.

    Args:
        pruned: The model that learns.
        teacher: The model that it learns from.
        data: Its example is what both answer.
        points: Per feature point of the pruned model that of the teacher.
        name: What to call the teacher in a message.
    """
    mine = _shapes(pruned, data, list(points), "the pruned model")
    theirs = _shapes(teacher, data, list(points.values()), name)
    for ours, other in {"logits": "logits", **points}.items():
        if mine[ours] != theirs[other]:
            hint = "" if ours == "logits" else "; with recover.features=0 only logits are compared"
            raise InputError(
                f"{name} does not fit as a teacher: its {other} have shape {theirs[other]}, "
                f"those of the pruned model {mine[ours]}; they must be the same{hint}"
            )


def _shapes(model: PrunableModel, data: DataBundle, points: Sequence[str], name: str) -> Shapes:
    try:
        with captured(model.network, points) as found:
            logits = model.logits(model.place(data.example))
    except (RuntimeError, ValueError, AssertionError, KeyError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"{name} cannot run on data={data.name}: {reason}") from error
    return {"logits": tuple(logits.shape), **{point: tuple(tensor.shape) for point, tensor in found.items()}}
