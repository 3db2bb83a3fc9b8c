"""Training what is left: it helps, it resumes, it keeps the plan."""

from pathlib import Path

import pytest
import torch

from data.base import TensorBatches
from evals.accuracy import Accuracy
from evals.base import Subject
from main import run
from models.base import PrunableModel
from prune.base import Plan
from prune.recovery.base import TrainedRecovery
from prune.recovery.distill import Distill, feature_error
from prune.recovery.finetune import Finetune
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.test_contract import random_plan
from utils.errors import InputError
from utils.storage import Store

WAYS = [Finetune(epochs=3), Distill(epochs=3), Distill(epochs=3, features=1.0, soft=1.0)]


def weights(model: PrunableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", WAYS, ids=["finetune", "distill", "distill_features"])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_recovery_trains_a_copy_and_keeps_the_plan(name: str, way: TrainedRecovery, tmp_path: Path) -> None:
    model, samples = ADAPTERS[name]()
    if getattr(way, "features", 0) and not model.feature_points():
        pytest.skip("this hand-made model names no feature points")
    data, plan = bundle_of(samples), random_plan(model, 0)
    pruned = cut(model, plan)
    before, dense = weights(pruned), weights(model)
    done = way.recover(pruned, model, data, Store(tmp_path), seed=0)
    assert equal(weights(pruned), before) and equal(weights(model), dense)
    assert not equal(weights(done.model), before)
    assert [g.count for g in done.model.unit_groups()] == [len(g.kept) for g in plan.groups]
    assert [row["epoch"] for row in done.history] == [0, 1, 2, 3]
    assert done.facts["steps"] == 9 and done.facts["samples_seen"] == 18 and done.facts["used_epoch"] == 3
    again = way.recover(pruned, model, data, Store(tmp_path), seed=0)
    assert equal(weights(again.model), weights(done.model)) and again.history == done.history


class Killed(TensorBatches):
    """Training data whose third epoch never comes."""

    def set_epoch(self, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        super().set_epoch(epoch)


@pytest.mark.parametrize("way", [Finetune(epochs=4), Distill(epochs=4)], ids=["finetune", "distill"])
def test_a_killed_recovery_goes_on_and_ends_the_same(way: TrainedRecovery, tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    model.network.get_submodule("blocks.0.dropout").p = 0.3  # type: ignore[assignment]
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    through = way.recover(pruned, model, data, Store(tmp_path / "through"), seed=5)

    doomed = type(data)(**{**vars(data), "train": Killed(samples, batch_size=2, shuffle_seed=0)})
    with pytest.raises(KeyboardInterrupt):
        way.recover(pruned, model, doomed, Store(tmp_path / "killed"), seed=5)
    assert list((tmp_path / "killed").rglob("*.partial"))
    resumed = way.recover(pruned, model, data, Store(tmp_path / "killed"), seed=5)
    assert resumed.history == through.history
    assert equal(weights(resumed.model), weights(through.model))
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_best_and_last_are_both_kept(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, pruned, store = bundle_of(samples), cut(model, random_plan(model, 0)), Store(tmp_path)
    settings = {"epochs": 6, "learning_rate": 0.3}
    last, best = (Finetune(**settings, use=use).recover(pruned, model, data, store, 0) for use in ("last", "best"))
    losses = [row["validation_loss"] for row in last.history[1:]]
    assert best.facts["used_epoch"] == 1 + losses.index(min(losses)) == last.facts["best_epoch"]
    if best.facts["used_epoch"] != 6:
        assert not equal(weights(best.model), weights(last.model))


def test_a_loss_that_explodes_stops(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    pruned = cut(model, Plan.of(model, {}))
    done = Finetune(epochs=4, learning_rate=1e30).recover(pruned, model, bundle_of(samples), Store(tmp_path), 0)
    assert done.facts["epochs"] == 0 and len(done.history) == 1 and equal(weights(done.model), weights(pruned))
    assert "loss is nan in epoch 1" in done.notes[0] and "the weights after epoch 0" in done.notes[0]


def test_recovery_needs_training_data(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    empty = TensorBatches({name: tensor[:0] for name, tensor in samples.items()}, batch_size=2)
    with pytest.raises(InputError, match="no training samples; use recover=none"):
        Finetune().recover(model, model, type(data)(**{**vars(data), "train": empty}), Store(tmp_path), 0)


def test_feature_error_by_hand() -> None:
    student = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
    teacher = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])}
    assert float(feature_error(student, teacher)) == pytest.approx((4 / 10 + 1) / 2)


def test_divergence_is_the_tempered_kl() -> None:
    _, samples = ADAPTERS["toy_images"]()
    task = bundle_of(samples).task
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    q, p = torch.softmax(student / 3, -1), torch.softmax(teacher / 3, -1)
    assert float(task.divergence(student, teacher, 3.0)) == pytest.approx(
        float(9 * (p * (p / q).log()).sum()), rel=1e-5
    )
    assert float(task.divergence(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("way", ["finetune", "distill"])
def test_a_run_with_recovery_records_its_curve(small_config: Compose, tmp_path: Path, way: str) -> None:
    record = run(small_config(f"recover={way}", "recover.epochs=2", "prune.ratio=0.3", "evals=[accuracy]"), tmp_path)
    found = record.to_json()["recovery"]
    assert [row["epoch"] for row in found["history"]] == [0, 1, 2] and found["method"] == way
    assert found["history"][-1]["validation_accuracy"] == pytest.approx(found_accuracy(record), abs=1e-6)
    assert (tmp_path / "plots" / "recovery_curve.png").is_file() and record.seconds["recover"] > 0
    assert "Recovered by" in (tmp_path / "report.md").read_text()


def found_accuracy(record) -> float:
    return record.pruned["accuracy"].value


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_without_60_percent_of_the_macs_come_back(tmp_path: Path, seed: int, composed: Compose) -> None:
    cfg = composed(
        "prune.ratio=0.6", "recover=finetune", f"seed={seed}", "evals=[accuracy]", f"storage={tmp_path / 's'}"
    )
    record = run(cfg, tmp_path / "out")
    dense, pruned = record.dense["accuracy"].value, record.pruned["accuracy"].value
    assert dense is not None and pruned is not None and pruned >= dense - 0.01


def test_accuracy_of_the_curve_is_that_of_the_metric(tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    done = Finetune(epochs=2).recover(model, model, data, Store(tmp_path), 0)
    measured = Accuracy().measure([Subject(done.model, data)])[0]["accuracy"].value
    assert done.history[-1]["validation_accuracy"] == pytest.approx(measured)
