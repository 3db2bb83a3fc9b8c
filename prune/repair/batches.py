"""Calibration samples in other batches: the same samples in the same order."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.base import Batch
from utils.errors import InputError
from utils.memory import rows_of


def merged(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Join batches that follow each other and are of one shape, up to `most` samples each."""
    found: list[Batch] = []
    for batch in batches:
        if found and _alike(found[-1], batch) and _count(found[-1]) + _count(batch) <= most:
            found[-1] = {name: torch.cat([tensor, batch[name]]) for name, tensor in found[-1].items()}
        elif _count(batch):
            found.append(batch)
    return found


def at_most(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The samples in batches of `size` at most; smaller ones stay what they are."""
    starts = [(batch, start) for batch in batches for start in range(0, _count(batch), size)]
    return [rows_of(batch, range(start, start + size)) for batch, start in starts]


def largest(batches: Sequence[Batch]) -> int:
    """Samples of the largest batch."""
    return max(map(_count, batches), default=0)


def regrouped(batches: Sequence[Batch], size: int, order: Tensor | None = None) -> list[Batch]:
    """The samples in batches of `size`, the last maybe smaller; shorter texts are padded to the longest of theirs.

    Args:
        batches: Any batches.
        size: Samples in each new one.
        order: Which samples to take, by their position among all, (N,); None for all as they come.

    Raises:
        InputError: If samples of unequal shape have no attention mask to pad by.
    """
    samples = [{name: tensor[i : i + 1] for name, tensor in b.items()} for b in batches for i in range(_count(b))]
    if order is not None:
        samples = [samples[int(i)] for i in order]
    return [_stacked(samples[start : start + size]) for start in range(0, len(samples), size)]


def _stacked(samples: Sequence[Batch]) -> Batch:
    longest = max(_length(sample) for sample in samples)
    return {name: torch.cat(list(_padded([s[name] for s in samples], samples, longest, name))) for name in samples[0]}


def _padded(tensors: Sequence[Tensor], samples: Sequence[Batch], longest: int, name: str) -> Iterator[Tensor]:
    """Tensors of one shape; those as long as their mask get zeros behind."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        yield from tensors
        return
    for tensor, sample in zip(tensors, samples, strict=True):
        length = _length(sample)
        if tensor.ndim != 2 or tensor.shape[1] != length:
            raise InputError(
                f"prune.batch_size: {name} of the calibration samples has unequal shapes and no attention mask; "
                "must be null"
            )
        # what a language model has to predict at padding does not count
        fill = -100 if name in ("targets", "labels") else 0
        yield pad(tensor, (0, longest - length), value=fill)


def _length(sample: Batch) -> int:
    mask = sample.get("attention_mask")
    return mask.shape[1] if mask is not None and mask.ndim == 2 else 0


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _alike(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        t.shape[1:] == other[name].shape[1:] and t.dtype == other[name].dtype for name, t in one.items()
    )
