"""Throughput from storage to answers: what is counted, what is waited for, and how models are compared."""

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evals import end_to_end as module
from evals.base import Subject
from evals.end_to_end import Slot, end_to_end, slot_of
from evals.throughput import Throughput
from models.base import Batch
from tests.adapters import ADAPTERS, bundle_of


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=found.perf_counter))
    return found


def loading(clock: Clock, sizes: list[int], seconds: float, first: float = 0.0) -> Any:
    """Batches that take a while to load, the first one longer."""

    def batches() -> Iterator[Batch]:
        clock.now += first
        for size in sizes:
            clock.now += seconds
            yield {"inputs": torch.zeros(size, 1)}

    return batches


def test_loading_and_work_count_and_the_start_does_not(clock: Clock) -> None:
    def answer(batch: Batch) -> None:
        clock.now += 2.0

    found = slot_of(loading(clock, [4, 4, 4, 2], 1.0, first=100.0), answer, 8.0)
    assert found == Slot(samples=10, seconds=9.0, waited=3.0), "three batches after the first, 1 s + 2 s each"


def test_it_begins_anew_where_samples_end_and_ends_with_a_whole_batch(clock: Clock) -> None:
    def answer(batch: Batch) -> None:
        clock.now += 1.0

    assert slot_of(loading(clock, [5], 0.5), answer, 4.0) == Slot(15, 4.5, 1.5), "a split of one batch"
    assert slot_of(loading(clock, [5], 0.5), answer, 0.0) == Slot(5, 1.5, 0.5), "one batch at least"
    assert slot_of(lambda: iter([]), answer, 1.0) == "there are no validation samples"


def slow_data(subject: Subject, seconds: float) -> Subject:
    """The same samples, each batch of which takes a while to come."""

    class Slow:
        def __iter__(self) -> Iterator[Batch]:
            for batch in subject.data.validation:
                time.sleep(seconds)
                yield batch

    return Subject(subject.model, replace(subject.data, validation=Slow()))


def test_slow_loading_is_seen_and_hides_what_the_model_gains() -> None:
    model, samples = ADAPTERS["toy_images"]()
    dense, slower = (Subject(m, bundle_of(samples)) for m in (model, model.copy()))
    logits = slower.model.logits
    slower.model.logits = lambda batch: time.sleep(0.01) or logits(batch)  # type: ignore[method-assign]
    alone = end_to_end([dense, slower], 0.3)[1].details
    bound = end_to_end([slow_data(dense, 0.05), slow_data(slower, 0.05)], 0.6)[1].details
    assert alone["speedup"] < 0.6 and not alone["data_bound"] and alone["speedup_interval"]
    assert bound["data_bound"] and bound["data_share"] > 0.6 and bound["speedup"] > alone["speedup"]


def test_out_of_memory_and_no_samples_are_reasons() -> None:
    model, samples = ADAPTERS["toy_images"]()
    subject = Subject(model, bundle_of(samples))
    empty = Subject(model, replace(subject.data, validation=[]))
    assert end_to_end([empty], 0.1)[0].reason == "there are no validation samples"

    def full(batch: Batch) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = Subject(model.copy(), subject.data)
    other.model.logits = full  # type: ignore[method-assign]
    good, bad = end_to_end([subject, other], 0.05)
    assert good.value and bad.value is None and "out of memory" in str(bad.reason)
    bad, good = end_to_end([other, subject], 0.05)
    assert bad.value is None and good.value and "speedup" not in good.details, "there is no dense model to compare with"


def test_throughput_has_it_beside_the_models_own() -> None:
    model, samples = ADAPTERS["toy_images"]()
    subject = Subject(model, bundle_of(samples))
    found = Throughput(batch=4, seconds=0.05, blocks=3).measure([subject])[0]
    whole = found["throughput_end_to_end"]
    assert list(found) == ["throughput", "throughput_end_to_end"] and whole.unit == "samples/s" and whole.value
    assert "decode or tokenise" in whole.how and whole.details["speedup"] == 1.0
    assert list(Throughput(batch=4, seconds=0.05, blocks=3, end_to_end=False).measure([subject])[0]) == ["throughput"]
