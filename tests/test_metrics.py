"""Each metric on cases whose answer is known."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from data.regression import Regression
from evals import macs as macs_module
from evals.accuracy import Accuracy
from evals.base import Subject
from evals.latency import Latency
from evals.loss import Loss
from evals.macs import Macs
from evals.nonzero_params import NonzeroParams
from evals.params import Params
from evals.peak_memory import PeakMemory, peak_on_cpu
from evals.quality import Quality
from evals.size import Size
from evals.throughput import Throughput
from models.checkpoint import save_model
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of
from tests.test_contract import random_plan
from utils.errors import InputError, RunError
from utils.storage import Store


@pytest.fixture
def subject() -> Subject:
    model, samples = ADAPTERS["toy_images"]()
    return Subject(model, bundle_of(samples))


def value(metric, subject: Subject, name: str):
    return metric.measure([subject])[0][name]


def test_accuracy_and_loss_by_hand(subject: Subject) -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    subject.predictions = [(logits[:3], {"labels": labels[:3]}), (logits[3:], {"labels": labels[3:]})]
    found = value(Accuracy(), subject, "accuracy")
    assert found.value == 0.75 and found.unit == "fraction"
    assert found.details["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    expected = nn.functional.cross_entropy(logits, labels)
    assert value(Loss(), subject, "loss").value == pytest.approx(float(expected)), "batches of unequal size"


def test_a_task_without_accuracy_says_what_it_is_scored_by(subject: Subject) -> None:
    subject.data = replace(subject.data, task=Regression())
    numbers = torch.tensor([[0.1], [0.4], [0.2], [0.9]])
    subject.predictions = [(numbers, {"labels": torch.tensor([1.0, 2.0, 3.0, 4.0])})]
    found = value(Accuracy(), subject, "accuracy")
    assert found.value is None and "spearman" in str(found.reason)
    assert value(Quality(), subject, "spearman").value == pytest.approx(0.8)


def test_zeroed_weights_change_nothing_but_the_non_zero_count(subject: Subject) -> None:
    metrics = {"macs": Macs(), "params": Params(), "nonzero_params": NonzeroParams(), "size": Size()}
    before = {name: value(metric, subject, name).value for name, metric in metrics.items()}
    weight = subject.model.network.get_parameter("blocks.0.fc1.weight")
    weight.data.zero_()
    after = {name: value(metric, subject, name).value for name, metric in metrics.items()}
    assert after["nonzero_params"] == before["nonzero_params"] - weight.numel()
    assert {**after, "nonzero_params": 0} == {**before, "nonzero_params": 0}


def test_size_is_that_of_the_saved_file(subject: Subject, tmp_path) -> None:
    for model in (subject.model, cut(subject.model, random_plan(subject.model, 0))):
        folder = save_model(model, tmp_path / "model")
        measured = value(Size(), Subject(model, subject.data), "size").value
        assert measured == (folder / "model.safetensors").stat().st_size


def test_macs_come_with_both_counters_under_their_names(subject: Subject) -> None:
    found = Macs().measure([subject])[0]
    assert found["macs"].value and found["macs"].value == found["macs"].details["flop_counter"]
    assert found["macs"].details["flops"] == 2 * found["macs"].value
    fvcore = found["fvcore_flops"]
    assert fvcore.value and "aten::scaled_dot_product_attention" in fvcore.details["uncounted_operators"]


def test_a_wrong_closed_form_ends_the_run(subject: Subject) -> None:
    class Boastful(type(subject.model)):
        def unit_groups(self):
            return tuple(replace(group, pairwise_features=0) for group in super().unit_groups())

    subject.model.__class__ = Boastful
    with pytest.raises(RunError, match="must agree within 1%"):
        Macs().measure([subject])


@pytest.mark.parametrize(("factor", "fails"), [(0.991, False), (1.009, False), (0.98, True), (1.02, True)])
def test_more_than_one_percent_between_the_counts_is_an_error(
    subject: Subject, monkeypatch, factor: float, fails: bool
) -> None:
    counted = macs_module.counted_macs
    monkeypatch.setattr(macs_module, "counted_macs", lambda *given: round(counted(*given) * factor))
    if not fails:
        assert Macs().measure([subject])[0]["macs"].value
        return
    with pytest.raises(RunError, match=r"MACs by the closed form but [\d,]+ by FlopCounterMode .* within 1%"):
        Macs().measure([subject])


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_counter_that_misses_or_doubles_attention_is_caught(subject: Subject, monkeypatch, wrong: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    right = FlopCounterMode.get_total_flops
    monkeypatch.setattr(FlopCounterMode, "get_total_flops", lambda self: wrong * right(self))
    with pytest.raises(RunError, match="can't be trusted"):
        Macs().measure([subject])


def test_a_known_allocation_is_seen() -> None:
    def run() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(3000)
        del first
        third = torch.zeros(2000)
        del second, third

    assert peak_on_cpu(run) == 4 * 5000


def test_peak_memory_adds_weights_and_activations(subject: Subject) -> None:
    found = value(PeakMemory(batch=5), subject, "peak_memory")
    assert found.value == found.details["weights"] + found.details["activations"]
    assert found.details["weights"] == 4 * sum(p.numel() for p in subject.model.network.parameters())
    double = value(PeakMemory(batch=10), subject, "peak_memory")
    assert double.details["activations"] == pytest.approx(2 * found.details["activations"], rel=0.05)


def test_latency_and_throughput_compare_to_the_first(subject: Subject) -> None:
    subjects = [subject, Subject(cut(subject.model, random_plan(subject.model, 0)), subject.data)]
    latency = [found["latency"] for found in Latency(seconds=0.1).measure(subjects)]
    assert latency[0].details["speedup"] == 1 and latency[1].details["speedup"] > 0
    assert all(
        f.unit == "ms" and f.details["n"] >= 20 and f.details["p99"] is None for f in latency if f.details["n"] < 1000
    )
    for found in latency:
        assert found.value and found.details["p10"] <= found.value <= found.details["p90"]
    throughput = [found["throughput"] for found in Throughput(batch=8, seconds=0.1).measure(subjects)]
    assert all(f.unit == "samples/s" and f.value for f in throughput)


def test_batches_for_timing_repeat_a_small_set(subject: Subject) -> None:
    assert len(subject.batch_of(50)["inputs"]) == 50
    assert torch.equal(subject.batch_of(2)["inputs"], subject.data.validation[0]["inputs"][:2])  # type: ignore[index]


@pytest.mark.parametrize(("metric", "rule"), [(Latency, "batch"), (Throughput, "batch"), (PeakMemory, "batch")])
def test_settings_are_checked(metric, rule: str) -> None:
    with pytest.raises(InputError, match=f"{rule}=0 must be at least 1"):
        metric(batch=0)


def test_dense_predictions_are_kept_and_only_for_the_same_weights(subject: Subject, tmp_path) -> None:
    calls = []
    logits = subject.model.logits
    subject.model.logits = lambda batch: calls.append(1) or logits(batch)  # type: ignore[method-assign]
    fresh = Subject(subject.model, subject.data).predictions
    first, second = (Subject(subject.model, subject.data, Store(tmp_path)).predictions for _ in range(2))
    batches = len(subject.data.validation)  # type: ignore[arg-type]
    assert len(calls) == 2 * batches, "the second time nothing is computed"
    for (a, x), (b, y), (c, z) in zip(fresh, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
        assert torch.equal(x["labels"], y["labels"]) and torch.equal(y["labels"], z["labels"])
    subject.model.network.get_parameter("head.bias").data.add_(1)
    changed = Subject(subject.model, subject.data, Store(tmp_path)).predictions
    assert torch.allclose(changed[0][0], fresh[0][0] + 1, atol=1e-5)
