"""Throughput from stored samples to answers on the host: loading, decoding, transforms, transfer and model together.

Shapes: a slot is one stretch of a model's work; a block is the slots A, B, B, A of dense and pruned.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evals.base import Measurement, Subject
from evals.timing_statistics import LEAST_BLOCKS, interval_of
from models.base import Batch
from utils.memory import out_of_memory
from utils.progress import progress_bar

UNIT = "samples/s"
DATA_BOUND = 0.5
HOW = (
    "validation samples over the time to load, decode or tokenise, transform and place them, run the model and bring "
    "its answers to the host, in the data's own batches; the first batch of each stretch is not counted, models take "
    "turns (ABBA)"
)


@dataclass(frozen=True)
class Slot:
    """What was done in one stretch: samples, seconds in all, and seconds in which the model waited for samples."""

    samples: int
    seconds: float
    waited: float


def end_to_end(subjects: Sequence[Subject], seconds: float, blocks: int = LEAST_BLOCKS) -> list[Measurement]:
    """Samples per second from storage to answers, models interleaved; the first subject is the reference.

    Args:
        subjects: The dense model first.
        seconds: Time to spend on each model, about.
        blocks: Rounds of A, B, B, A.
    """
    turns = [*range(len(subjects)), *reversed(range(len(subjects)))] * blocks
    found: list[list[Slot]] = [[] for _ in subjects]
    problems: dict[int, str] = {}
    with progress_bar("throughput, end to end", len(turns), still=True) as advance:
        for number in turns:
            if number not in problems:
                slot = _tried(subjects[number], seconds / (2 * blocks))
                problems |= {number: slot} if isinstance(slot, str) else {}
                found[number] += [slot] if isinstance(slot, Slot) else []
            advance(subjects[number].model.name)
    return [
        Measurement(None, UNIT, problems[number]) if number in problems else _measured(slots, _dense(found, problems))
        for number, slots in enumerate(found)
    ]


def _dense(found: Sequence[list[Slot]], problems: dict[int, str]) -> list[Slot] | None:
    return None if 0 in problems else found[0]


def _tried(subject: Subject, seconds: float) -> Slot | str:
    try:
        return slot_of(subject.data.validation.__iter__, lambda batch: _answered(subject, batch), seconds)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return "out of memory at the data's own batch"


@torch.inference_mode()
def _answered(subject: Subject, batch: Batch) -> object:
    return subject.model.logits(subject.model.place(batch)).cpu()


def slot_of(batches: Callable[[], Iterator[Batch]], answer: Callable[[Batch], object], seconds: float) -> Slot | str:
    """Work through batches for at least so many seconds, in whole batches, beginning anew where they end.

    Args:
        batches: Begins with the first batch whenever it is called.
        answer: What is done with each.
        seconds: Least length, after the first batch: with that one, whatever loads them gets going.
    """
    left = batches()
    if (first := next(left, None)) is None:
        return "there are no validation samples"
    answer(first)
    samples, waited, start = 0, 0.0, time.perf_counter()
    while (asked := time.perf_counter()) - start < seconds or not samples:
        batch = next(left, None)
        if batch is None:
            left = batches()
            batch = next(left)
        waited += time.perf_counter() - asked
        answer(batch)
        samples += len(next(iter(batch.values())))
    return Slot(samples, time.perf_counter() - start, waited)


def _measured(slots: Sequence[Slot], dense: Sequence[Slot] | None) -> Measurement:
    seconds, waited = (sum(getattr(slot, name) for slot in slots) for name in ("seconds", "waited"))
    samples = sum(slot.samples for slot in slots)
    share = waited / seconds
    details: dict[str, Any] = {"samples": samples, "seconds": seconds, "data_share": share}
    details["data_bound"] = share > DATA_BOUND
    if dense is not None:
        ratios = [theirs / ours for theirs, ours in zip(_per_block(dense), _per_block(slots), strict=True)]
        details |= {"speedup": statistics.median(ratios), "speedup_interval": interval_of(ratios)}
    return Measurement(samples / seconds, UNIT, details=details, how=HOW)


def _per_block(slots: Sequence[Slot]) -> list[float]:
    """Seconds per sample of each block's two slots together."""
    pairs = zip(slots[::2], slots[1::2], strict=True)
    return [sum(s.seconds for s in pair) / sum(s.samples for s in pair) for pair in pairs]
