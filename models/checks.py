"""Refusing, before any work, a model that can't run on the data or holds no usable weights."""

import torch

from data.base import DataBundle
from models.base import PrunableModel
from utils.errors import InputError


def refuse_misfit(model: PrunableModel, data: DataBundle) -> None:
    """Raise an InputError if the model can't process a sample or answers in other labels."""
    try:
        with torch.inference_mode():
            logits = model.logits(model.place(data.example))
    except (RuntimeError, ValueError, AssertionError, KeyError, TypeError, IndexError) as error:
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in data.example.items()}
        raise InputError(
            f"model={model.name} cannot run on data={data.name}, whose samples have shape {shapes}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if misfit := data.task.misfit(logits):
        raise InputError(f"model={model.name} does not fit data={data.name}: {misfit}")


def refuse_untrained(model: PrunableModel) -> None:
    """Raise an InputError if the model holds random weights and no way to better ones."""
    if model.training is None and not model.has_weights:
        raise InputError(
            f"model={model.name}: is left at random weights, in part at least; give a model.checkpoint that has all "
            "of them (or model.pretrained=true, where the model has it), or model.training to train it on first use"
        )


def refuse_non_finite(model: PrunableModel) -> None:
    """Raise an InputError that names the first weight which is NaN or infinite."""
    for name, tensor in model.network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"model={model.name}: weight {name!r} has {bad} NaN or infinite of {tensor.numel()} values; "
                "every weight must be finite"
            )
