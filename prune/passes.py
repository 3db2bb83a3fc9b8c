"""Calibration passes of methods that watch what flows through a model's blocks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.gates import calibration_of, undisturbed
from prune.repair.batches import at_most, largest
from utils.distributed import rank, world_size
from utils.hooks import Hook, hooked
from utils.memory import restarted
from utils.progress import progress_bar

T = TypeVar("T")


def in_fitting_batches(data: DataBundle, work: str, do: Callable[[DataBundle], T]) -> T:
    """Do work that adds up over calibration samples; where memory runs out, from the beginning with smaller batches.

    Args:
        data: Source of the batches.
        work: What is done, in words.
        do: Must give the same for the same samples in other batches, and start anew whenever it is called.
    """
    batches = data.calibration
    most = largest(batches)

    def with_most(size: int) -> T:
        return do(data if size == most else replace(data, calibration=at_most(batches, size)))

    return restarted(work, most, with_most)


class _Enough(Exception):
    """Ends a forward pass behind the last block: the head is not needed, and that of a language model is dear."""


def watch_calibration(
    model: PrunableModel,
    data: DataBundle,
    title: str,
    start: Callable[[Batch], Any],
    before: Sequence[Hook] = (),
    after: Sequence[Hook] = (),
    divided: bool = False,
) -> None:
    """Run every calibration batch once through all blocks, with hooks in place.

    Args:
        model: The dense model; left exactly as it was.
        data: Source of the batches.
        title: Label of the progress bar.
        start: Told each batch, on the model's device, before its pass.
        before: Pairs of module and forward pre-hook.
        after: Pairs of module and forward hook.
        divided: Let each process of a run see its own batches alone; the caller then sums what hooks have added up.

    Raises:
        InputError: If there is no calibration data.
    """
    batches = calibration_of(data).calibration
    ends = [(model.network.get_submodule(model.blocks()[-1]), _stop)]
    with undisturbed(model.network), torch.inference_mode(), progress_bar(title, len(batches)) as advance:
        # the hook that ends a pass is the last on its module
        with hooked(before, after), hooked(after=ends):
            for number, batch in enumerate(batches):
                if not divided or number % world_size() == rank():
                    placed = model.place(batch)
                    start(placed)
                    try:
                        model.logits(placed)
                    except _Enough:
                        pass
                advance("")


def _stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise _Enough


def states_of(output: Any) -> Tensor:
    """The states (B, T, D) in what a block gives, which may be a tuple that starts with them."""
    return output if isinstance(output, Tensor) else output[0]
