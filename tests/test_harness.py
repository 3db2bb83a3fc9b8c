"""The harness: warm-up, intervals, saturation, refusals, memory, and a model against itself."""

import itertools
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from evals import harness
from evals.base import Measurement, Subject
from evals.comparable import refuse_incomparable
from evals.evaluate import evaluate
from evals.isolated import in_fresh_process
from evals.latency import Latency
from evals.notes import timing_notes
from evals.params import Params
from evals.peak_memory import PeakMemory
from evals.saturation import saturating_batch
from evals.self_test import SelfTest, unequal
from evals.side_files import measured_json, side_files
from evals.size import Size, compressed_bytes
from evals.throughput import Throughput
from evals.timing import Protocol, time_interleaved
from evals.timing_statistics import Timings, comparison, interval_of, ratios_of, ratios_to_itself, statistics_ms
from models.toy_encoder import toy_encoder
from prune.none import Copy
from prune.surgery import cut
from tests.adapters import ADAPTERS, batch, bundle_of
from tests.modules import CLASSES
from tests.test_contract import random_plan
from utils.errors import InputError, RunError

CPU = torch.device("cpu")


@pytest.fixture
def subject() -> Subject:
    model, samples = ADAPTERS["toy_images"]()
    return Subject(model, bundle_of(samples))


def timings(*slots: tuple[float, float]) -> Timings:
    return Timings(0, [([a], [b]) for a, b in slots])


def test_block_ratios_and_their_interval_by_hand() -> None:
    dense, pruned = timings((4, 6), (8, 8), (3, 1)), timings((2, 3), (4, 4), (2, 2))
    assert ratios_of(dense, pruned) == [2.0, 2.0, 1.0]
    assert interval_of([2.0, 2.0]) is None, "two blocks say nothing of their spread"
    assert interval_of([1.5] * 4) == (1.5, 1.5)
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4]
    medians = [np.median(drawn) for drawn in itertools.product(ratios, repeat=5)]  # every resample there is
    low, high = interval_of(ratios)  # type: ignore[misc]
    assert (low, high) == pytest.approx(np.percentile(medians, (2.5, 97.5)), abs=0.02)
    assert interval_of(ratios) == interval_of(ratios) and interval_of(ratios, level=0.5) != interval_of(ratios)


def test_a_model_against_itself_is_free_of_linear_drift() -> None:
    drifting = timings(*((10 + 0.4 * block, 10.3 + 0.4 * block) for block in range(5)))
    assert ratios_to_itself(drifting) == pytest.approx([1.0] * 4)
    found = comparison(drifting, drifting)
    assert found["speedup"] == 1 and "status" not in found
    restless = timings((10, 10), (20, 10), (10, 30), (10, 10))
    assert comparison(restless, restless)["status"] == "unreliable"


def test_statistics_by_hand() -> None:
    found = statistics_ms(Timings(9.0, [([1.0, 2.0], [3.0, 4.0])], 5, False))
    assert (found["p50"], found["mean"], found["n"], found["first_call"]) == (2.5, 2.5, 4, 9.0)
    assert found["cv"] == pytest.approx(1.2909944 / 2.5) and found["p99"] is None and found["warmup_stable"] is False


def test_warm_up_goes_on_until_times_are_stable() -> None:
    calls: list[int] = []

    def settling() -> None:
        calls.append(1)
        time.sleep(0.002 + 0.03 / len(calls) ** 2)

    (found,) = time_interleaved([settling], CPU, Protocol(warmup=4, blocks=1, seconds=1.0, most_calls=2))
    assert found.warmup_calls > 5 and found.first_ms > 25 and max(found.all_ms) < 12
    assert len(calls) == found.warmup_calls + 2


def test_precision_adds_blocks_and_ends() -> None:
    noise = itertools.cycle([0.001, 0.004, 0.002, 0.006, 0.001, 0.003])
    calls = [lambda: time.sleep(next(noise)), lambda: time.sleep(next(noise))]
    asked = Protocol(warmup=1, blocks=3, seconds=0.01, least_calls=6, precision=1e-9, longest=0.3)
    found = time_interleaved(calls, CPU, asked)
    assert len(found[0].blocks_ms) > 3 and len(found[0].blocks_ms) == len(found[1].blocks_ms)
    assert len(time_interleaved(calls, CPU, replace(asked, precision=None))[0].blocks_ms) == 3


def test_saturation_is_the_smallest_batch_near_the_best() -> None:
    def rate(batch: int) -> float:
        return 1000 * min(batch, 16)

    found = saturating_batch(rate, 1024)
    assert found.batch == 16 and [b for b, _ in found.tried] == [1, 2, 4, 8, 16, 32, 64]
    assert saturating_batch(rate, 4).batch == 4
    assert saturating_batch(lambda b: 100.0, 1024).batch == 1
    full = saturating_batch(lambda b: None if b > 8 else 10.0 * b, 1024)
    assert full.batch == 8 and full.to_json()[-1] == {"batch": 16, "samples_per_s": None, "reason": "out of memory"}
    assert saturating_batch(lambda b: None, 8).batch == 1


def test_auto_times_all_at_one_batch_and_says_each_ones_own(subject: Subject, monkeypatch) -> None:
    small = Subject(cut(subject.model, random_plan(subject.model, 0)), subject.data)
    rates = {id(subject): 2, id(small): 4}
    monkeypatch.setattr(harness, "_rate", lambda s, n, compiled: 10.0 * min(n, rates[id(s)]))
    found = [f["throughput"] for f in Throughput(batch="auto", seconds=0.02, largest=16).measure([subject, small])]
    assert [f.details["batch"] for f in found] == [4, 4]
    assert [f.details["own_batch"] for f in found] == [2, 4]
    assert [f.details["at_own_batch"]["batch"] for f in found] == [2, 4]
    assert found[0].details["searched"][0] == {"batch": 1, "samples_per_s": 10.0}


def test_out_of_memory_is_a_result_at_an_unchanged_batch(subject: Subject) -> None:
    logits = subject.model.logits

    def too_large(samples: Any) -> Any:
        if len(samples["inputs"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(samples)

    subject.model.logits = too_large  # type: ignore[method-assign]
    for metric, name in ((Throughput(batch=8), "throughput"), (PeakMemory(batch=8), "peak_memory")):
        found = metric.measure([subject])[0][name]
        assert found.value is None and found.reason == "out of memory at batch 8"
    found = Throughput(batch="auto", seconds=0.02).measure([subject])[0]["throughput"]
    assert found.value and found.details["batch"] <= 4 and found.details["searched"][-1]["samples_per_s"] is None


def test_raw_times_lie_beside_the_record(subject: Subject) -> None:
    found = Latency(seconds=0.02, blocks=3).measure([subject])[0]
    ((name, content),) = side_files("dense", found)
    raw = json.loads(content)
    assert name == "raw_latency_dense.json" and measured_json("dense", found)["latency"]["files"] == [name]
    assert sum(len(slot) for block in raw["blocks"] for slot in block) == found["latency"].details["n"]


def test_times_that_vary_are_flagged() -> None:
    dense, steady = {"latency": {"cv": 0.031}}, {"latency": {"cv": 0.03}}
    (note,) = timing_notes(dense, steady, {})
    assert "varied by more than 3%" in note and "latency of the dense model 3%" in note and "pruned" not in note
    assert timing_notes(steady, steady, {}) == []


def test_fewer_than_three_blocks_are_refused() -> None:
    for metric in (Latency, Throughput):
        with pytest.raises(InputError, match="blocks=2 must be at least 3"):
            metric(blocks=2)


def test_other_heads_and_other_data_are_refused(subject: Subject) -> None:
    other_head = toy_encoder(classes=CLASSES + 2, image_size=8, width=24, depth=2, heads=4, neurons=20)
    with pytest.raises(InputError, match=rf"answers of the shapes \({CLASSES},\) and \({CLASSES + 2},\)"):
        refuse_incomparable([subject, Subject(other_head, subject.data)])
    prints = {"train": "t", "calibration": "c", "validation": "other"}
    other_data = Subject(subject.model, replace(subject.data, fingerprints=prints))
    for metric in (Latency(seconds=0.01), Throughput(seconds=0.01)):
        with pytest.raises(InputError, match="validation data have the fingerprints v and other"):
            metric.measure([subject, other_data])
    with pytest.raises(InputError, match="class head"):
        next(evaluate([subject.model, other_head], subject.data, {"params": Params()}))


def test_each_figure_says_how_it_was_made(subject: Subject) -> None:
    (found,) = evaluate([subject.model], subject.data, {"params": Params()})
    said = found[0]["params"].to_json()
    assert said["how"] and said["status"] == "measured"
    assert Measurement(None, "ms", "no clock").to_json() == {
        "value": None, "unit": "ms", "status": "null", "reason": "no clock",
    }  # fmt: skip
    assert Measurement(1.0, "J", details={"status": "estimated"}).to_json()["status"] == "estimated"


def test_a_fresh_process_times_the_very_model(subject: Subject) -> None:
    found = Latency(seconds=0.05, blocks=3, isolate=True).measure([subject])[0]["latency"]
    assert found.value and found.details["isolated"] and found.details["speedup"] == 1
    assert "not interleaved" in found.how


@pytest.mark.slow
def test_compiled_models_are_timed_and_compiling_is_told_apart(subject: Subject) -> None:
    pruned = Subject(cut(subject.model, random_plan(subject.model, 0)), subject.data)
    found = Latency(seconds=0.1, blocks=3, compile=True).measure([subject, pruned])
    for figures in found:
        compiled = figures["latency_compiled"]
        if compiled.value is None:
            pytest.skip(str(compiled.reason))
        assert compiled.details["compiled"] and compiled.details["compile_seconds"] > 0.1
        assert 1000 * compiled.details["compile_seconds"] > 10 * compiled.details["first_call"], "it came before"
        assert "compile_seconds" not in figures["latency"].details and compiled.details["speedup_interval"]


def test_a_model_that_does_not_compile_is_a_reason(subject: Subject, monkeypatch) -> None:
    def broken(logits: Any, dynamic: bool) -> Any:
        def call(samples: Any) -> Any:
            raise RuntimeError("no compiler here\nat all")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    found = Latency(seconds=0.02, blocks=3, compile=True).measure([subject])[0]
    assert found["latency"].value and found["latency_compiled"].value is None
    assert found["latency_compiled"].reason == "torch.compile failed: no compiler here"


def test_a_process_that_answers_otherwise_is_refused(subject: Subject) -> None:
    subject.model.network.train()  # dropout would be harmless; another forward is not
    logits = subject.model.logits
    subject.model.logits = lambda samples: logits(samples) + 1  # type: ignore[method-assign]
    job = {"task": "memory"}
    assert "other answers" in in_fresh_process(subject, 2, job)["reason"]


def test_resident_memory_sees_a_large_model() -> None:
    model = toy_encoder(classes=5, image_size=8, width=512, depth=2, heads=4, neurons=2048)
    found = PeakMemory(batch=2, resident=True).measure([Subject(model, bundle_of(batch(1, 8, 8)))])[0]["peak_memory"]
    resident, weights = found.details["resident"], found.details["weights"]
    assert resident["weights"] > 0.8 * weights and resident["peak"] > resident["libraries"] + 0.8 * weights
    assert found.details["at_batch_1"] < found.value  # type: ignore[operator]


def test_size_is_also_compressed(subject: Subject) -> None:
    for parameter in subject.model.network.parameters():
        parameter.data.zero_()
    found = Size().measure([subject])[0]["size"]
    assert found.details["compressed"] < 0.2 * found.value and "zlib" in found.details["codec"]  # type: ignore[operator]
    assert "compressed" not in Size(compress=False).measure([subject])[0]["size"].details
    assert compressed_bytes(b"") == 0


def test_a_copy_equals_the_model_and_a_slower_one_does_not(subject: Subject) -> None:
    twin = Copy().apply(subject.model, Copy().plan(subject.model, None, None))  # type: ignore[arg-type]
    assert twin is not subject.model and twin.fingerprint() == subject.model.fingerprint()
    pair = [subject, Subject(twin, subject.data)]
    loose = SelfTest(timed={"latency": Latency(seconds=0.05)}, equal={"size": Size()}, tolerance=0.9)
    assert "self_test" in loose.measure(pair)[1]
    logits = twin.logits
    twin.logits = lambda samples: time.sleep(0.02) or logits(samples)  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"latency is 0\.\d+x as fast.*must be 1.00 within 2%"):
        SelfTest(timed={"latency": Latency(seconds=0.05)}, equal={}, attempts=1).measure(pair)


def test_self_test_refuses_what_is_no_copy(subject: Subject) -> None:
    test = SelfTest(timed={}, equal={"size": Size()})
    with pytest.raises(InputError, match="two copies"):
        test.measure([subject])
    with pytest.raises(InputError, match="differ"):
        test.measure([subject, Subject(cut(subject.model, random_plan(subject.model, 0)), subject.data)])
    found = {"size": Measurement(1, "byte")}, {"size": Measurement(2, "byte")}
    assert unequal(*found, 0.02) == ["size is 1 and 2; it must be the same"]
