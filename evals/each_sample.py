"""Which validation samples a model answers rightly: kept beside the record, so that runs can be compared in pairs."""

import torch
from safetensors.torch import save

from data.base import Condensing
from evals.base import Subject

ENDING, TENSOR = "each.safetensors", "right"


def right_of_each(subject: Subject) -> dict[str, bytes]:
    """A file with one byte a validation sample, 1 where it is answered rightly, in the split's order.

    Empty for tasks that are not scored sample by sample.
    """
    task = subject.data.task
    if isinstance(task, Condensing):
        return {}
    right = list[torch.Tensor]()
    for logits, batch in subject.predictions:
        found = task.quality(logits, batch)
        if "accuracy" not in found:
            return {}
        right.append(found["accuracy"])
    return {ENDING: save({TENSOR: torch.cat(right).to(torch.uint8)})} if right else {}
