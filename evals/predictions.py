"""A model's answers on the validation split, kept on disk where a sweep would ask for them again."""

from typing import Any

import torch
from torch import Tensor

from data.base import DataBundle
from models.base import Batch, PrunableModel
from utils.code import code_hash
from utils.storage import Artifact, Scratch, Store, folder_name

Predictions = list[tuple[Tensor, Batch]]


@torch.inference_mode()
def predictions_of(model: PrunableModel, data: DataBundle) -> Predictions:
    """Logits of every validation batch, float32 on the CPU, with what scoring needs of the batch."""
    targets = data.task.targets
    return [
        (
            model.logits(model.place(batch)).float().cpu(),
            {name: tensor for name, tensor in batch.items() if name in targets},
        )
        for batch in data.validation
    ]


def kept_predictions(model: PrunableModel, data: DataBundle, store: Store) -> Predictions:
    """The same, computed once for all runs that share weights, code, validation split and machine."""

    def compute(scratch: Scratch) -> Artifact:
        tensors = {}
        for number, (logits, batch) in enumerate(predictions_of(model, data)):
            tensors |= {f"{number:06}/{name}": tensor for name, tensor in {"logits": logits, **batch}.items()}
        return Artifact(tensors, {"model": model.name, "data": data.name})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, "predictions", _key(model, data), compute)
    batches: dict[str, Batch] = {}
    for name, tensor in sorted(found.artifact.tensors.items()):
        number, _, leaf = name.partition("/")
        batches.setdefault(number, {})[leaf] = tensor
    return [(batch.pop("logits"), batch) for batch in batches.values()]


def _key(model: PrunableModel, data: DataBundle) -> dict[str, Any]:
    return {
        "weights": model.fingerprint(),
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "code": code_hash(type(model), *model.code, type(data.task)),
        "validation": data.fingerprints["validation"],
        "task": data.task.name,
        "dtype": str(model.dtype),
        "device": model.device.type,
        # the last bits of a product depend on how it was split
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
