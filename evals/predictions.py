"""A model's answers on the validation split, kept on disk where a sweep would ask for them again."""

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from data.base import Condensing, DataBundle, Task
from models.base import Batch, PrunableModel
from models.pretrained import samples_in
from utils.code import code_hash
from utils.distributed import divided, own_share
from utils.memory import Portions, rows_of
from utils.progress import progress_bar
from utils.storage import Artifact, Scratch, Store, folder_name

Predictions = list[tuple[Tensor, Batch]]


@torch.inference_mode()
def predictions_of(
    model: PrunableModel, data: DataBundle, batches: Iterable[Batch] | None = None, joint: bool = True
) -> Predictions:
    """Logits of every batch, float32 on the CPU, with what scoring needs of the batch.

    A task whose logits are too large to keep condenses each batch's as soon as they are there.

    Args:
        model: The model that answers.
        data: The task.
        batches: What is answered; None: the validation split.
        joint: Whether the processes of a run share the batches; each batch is answered as a whole by one of them,
            so that answers don't depend on how many there are.
    """
    portions = Portions("evaluation")

    def answered(batch: Batch) -> tuple[Batch, None]:
        def part(rows: range) -> Tensor:
            placed = model.place(rows_of(batch, rows))
            return _answer(data.task, model.logits(placed), placed)

        answer = torch.cat([*portions.each(samples_in(batch), part)])
        advance("")
        return {"logits": answer, **{n: tensor for n, tensor in batch.items() if n in data.task.targets}}, None

    split = data.validation if batches is None else batches
    steps = len(split) if isinstance(split, Sized) else 0
    with progress_bar(f"answers of {model.name}", own_share(steps) if joint else steps) as advance:
        found = [tensors for tensors, _ in (divided(split, answered) if joint else map(answered, split))]
    return [(batch.pop("logits"), batch) for batch in found]


def _answer(task: Task, logits: Tensor, batch: Batch) -> Tensor:
    return (task.condensed(logits, batch) if isinstance(task, Condensing) else logits.float()).cpu()


def kept_predictions(
    model: PrunableModel,
    data: DataBundle,
    store: Store,
    batches: Iterable[Batch] | None = None,
    identity: str | None = None,
) -> Predictions:
    """The same, computed once for all runs that share weights, code, samples and machine.

    Args:
        model: The model that answers.
        data: The task.
        store: Where answers are kept.
        batches: What is answered; None: the validation split.
        identity: Hash of the batches; needed where they are given.
    """

    def compute(scratch: Scratch) -> Artifact:
        tensors = {}
        for number, (logits, batch) in enumerate(predictions_of(model, data, batches, store.joint)):
            tensors |= {f"{number:06}/{name}": tensor for name, tensor in {"logits": logits, **batch}.items()}
        return Artifact(tensors, {"model": model.name, "data": data.name})

    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"
    found = store.fetch(folder, "predictions", _key(model, data, identity), compute)
    answers: dict[str, Batch] = {}
    for name, tensor in sorted(found.artifact.tensors.items()):
        number, _, leaf = name.partition("/")
        answers.setdefault(number, {})[leaf] = tensor
    return [(batch.pop("logits"), batch) for batch in answers.values()]


def _key(model: PrunableModel, data: DataBundle, identity: str | None) -> dict[str, Any]:
    return {
        "weights": model.fingerprint(),
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "code": code_hash(type(model), *model.code, type(data.task)),
        "validation": identity or data.fingerprints["validation"],
        "task": data.task.name,
        "dtype": str(model.dtype),
        "device": model.device.type,
        # the last bits of a product depend on how it was split
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
