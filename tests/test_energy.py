"""Energy: exact joules from a known counter, null with a reason otherwise, and no estimate in a measurement's place."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evals.energy as energy
import evals.energy_windows as energy_windows
from evals.base import Subject
from evals.energy import Energy
from evals.energy_windows import Found, Idle, Lengths, Window, idle_facts, power_drift, settle, take_turns, window
from evals.meters import Nvml, Rapl, Reading, Status, codecarbon, nvml, rapl
from evals.notes import timing_notes
from prune.surgery import cut
from tests.adapters import bundle_of, causal, toy_on_tokens
from tests.test_contract import random_plan
from tests.test_decode import zeroed
from utils.errors import InputError

SHORT: dict[str, Any] = {
    "seconds": 0.01, "idle_seconds": 0.01, "settle_seconds": 0.02, "blocks": 2, "prompt_tokens": 8, "new_tokens": 4,
}  # fmt: skip


class Fake:
    """A counter that gains so many joules in a window of work, and so many while nothing is done."""

    name = "fake"
    status: Status = "measured"

    def __init__(self, idle: float, work: float = 0.0, problem: str | None = None) -> None:
        self.idle, self.work, self.problem, self.slept = idle, work, problem, False

    def start(self) -> None:
        self.slept = False

    def stop(self) -> Reading:
        return Reading(self.idle if self.slept else self.work, problem=self.problem)


@pytest.fixture(autouse=True)
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let counters know what window is an idle one."""
    real = energy_windows.time

    class Clock:
        monotonic = staticmethod(real.monotonic)

        @staticmethod
        def sleep(seconds: float) -> None:
            for meter in counters:
                meter.slept = True
            real.sleep(seconds)

    counters: list[Fake] = []
    make = Fake.__init__

    def noted(self: Fake, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        counters.append(self)

    monkeypatch.setattr(Fake, "__init__", noted)
    monkeypatch.setattr(energy_windows, "time", Clock)
    yield


def test_windows_are_whole_pieces_and_turns_are_abba() -> None:
    order: list[str] = []
    works = [lambda: order.append("a"), lambda: order.append("b")]
    found = take_turns(works, 5, Fake(1.0), Lengths(0.0, 0.0, 0.0), blocks=2)
    assert order == ["a", "b", *"abba", *"abba"], "one of each to warm up"
    assert [len(mine.windows) for mine in found] == [4, 4] and found[0].windows[0].units == 5
    done = window(lambda: None, 3, Fake(0.0, 1.0), 0.05)
    assert done.seconds >= 0.05 and done.units % 3 == 0 and done.units > 3


def test_joules_per_token_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = causal("llama")
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    counter = Fake(0.0, 8.0)  # idle, then 8 J in every window
    monkeypatch.setattr(energy, "counters", lambda device: (counter, {}))
    found = Energy(estimate=False, batch=2, **SHORT).measure([Subject(model, data), Subject(pruned, data)])
    for figures in found:
        figure = figures["energy"]
        assert figure.unit == "J/token" and figure.details["status"] == "measured" and set(figures) == {"energy"}
        assert figure.value == pytest.approx(sum(figure.details["per_window"]) / 4)
        assert figure.details["idle_corrected"] == figure.value, "nothing was idle"
        assert figure.details["watts"] == pytest.approx(32 / figure.details["seconds"])
        assert figure.details["units"] % (2 * 4) == 0
    monkeypatch.setattr(energy, "counters", lambda device: (Fake(5.0, 8.0), {}))
    idle = Energy(estimate=False, **SHORT).measure([Subject(model, data)])[0]["energy"]
    assert idle.details["idle_corrected"] < float(idle.value or 0) and idle.details["idle_watts"] > 0
    low, high = idle.details["idle_corrected_range"]
    assert low <= idle.details["idle_corrected"] <= high


def test_other_models_count_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, samples = toy_on_tokens()
    monkeypatch.setattr(energy, "counters", lambda device: (Fake(0.0, 1.0), {}))
    found = Energy(estimate=False, batch=3, **SHORT).measure([Subject(toy, bundle_of(samples))])[0]["energy"]
    assert found.unit == "J/sample" and found.details["units"] % 3 == 0 and "new_tokens" not in found.details


def test_no_counter_and_a_bad_one_give_null(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = causal("llama")
    subject = Subject(model, bundle_of(samples))
    monkeypatch.setattr(energy, "counters", lambda device: (None, {"RAPL": "no RAPL counter: nothing there"}))
    none = Energy(estimate=False, **SHORT).measure([subject])[0]["energy"]
    assert none.value is None and none.reason == "no RAPL counter: nothing there"
    monkeypatch.setattr(energy, "counters", lambda device: (Fake(0.0, 0.0, problem="it did not move"), {}))
    still = Energy(estimate=False, **SHORT).measure([subject])[0]["energy"]
    assert still.value is None and still.reason == "it did not move"


def test_zeros_alone_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = causal("llama")
    data = bundle_of(samples)
    monkeypatch.setattr(energy, "counters", lambda device: (Fake(0.0, 1.0), {}))
    dense, sparse = Energy(estimate=False, **SHORT).measure([Subject(model, data), Subject(zeroed(model), data)])
    assert dense["energy"].value and sparse["energy"].value is None
    assert "compression only" in str(sparse["energy"].reason)


def test_an_estimate_has_a_name_of_its_own() -> None:
    pytest.importorskip("codecarbon")
    assert not isinstance(codecarbon("DEU"), str)
    model, samples = causal("llama")
    found = Energy(country="DEU", **{**SHORT, "seconds": 0.3, "blocks": 1}).measure(
        [Subject(model, bundle_of(samples))]
    )[0]
    assert (
        found["energy_estimated"].details["status"] == "estimated" and float(found["energy_estimated"].value or 0) > 0
    )
    assert found["co2"].unit == "kg/1000 tokens" and float(found["co2"].value or 0) > 0
    if found["energy"].value is None:
        assert found["energy"].reason
    nowhere = Energy(**{**SHORT, "seconds": 0.3, "blocks": 1}).measure([Subject(model, bundle_of(samples))])[0]
    assert nowhere["co2"].value is None and "country" in str(nowhere["co2"].reason)


def test_idle_is_taken_off_by_the_mean_of_before_and_after() -> None:
    windows = [Window(Reading(100.0), 10.0, 5), Window(Reading(120.0), 10.0, 5)]
    found = idle_facts(Found(windows, Idle(2.0, 4.0)))
    assert found["idle_corrected"] == pytest.approx(((100 - 30) / 5 + (120 - 30) / 5) / 2)
    assert found["idle_corrected_range"] == pytest.approx([14.0, 18.0]) and found["idle_watts"] == 3.0
    assert found["idle_drift"] == pytest.approx(2 / 3) and Idle(0.0, 0.0).drift is None
    assert power_drift(windows) == pytest.approx(0.2) and power_drift(windows[:1]) is None


def test_windows_begin_when_power_is_steady() -> None:
    class Heating:
        """A meter by which power rises towards 10 W: 1 - 2^-n of it in the n-th window."""

        name, status = "fake", "measured"
        windows = 0

        def start(self) -> None:
            self.windows += 1
            self.begun = time.monotonic()

        def stop(self) -> Reading:
            return Reading(10 * (1 - 0.5**self.windows) * (time.monotonic() - self.begun))

    meter: Any = Heating()
    assert settle([lambda: time.sleep(0.02)], meter, Lengths(1.0, 0.0, 5.0)) and 5 <= meter.windows <= 8
    meter = Heating()
    assert not settle([lambda: time.sleep(0.02)], meter, Lengths(1.0, 0.0, 0.1)), "no time to settle"


def test_drift_stands_on_top_of_the_report() -> None:
    steady = {"value": 1.0, "unit": "J/sample", "idle_drift": 0.02, "power_drift": -0.01, "settled": True}
    assert timing_notes({"energy": steady}, {"energy": steady}, {}) == []
    (note,) = timing_notes({"energy": steady}, {"energy": {**steady, "power_drift": 0.2, "idle_drift": 0.3}}, {})
    assert "+20%" in note and "30%" in note and "energy" in note
    (note,) = timing_notes({"energy": steady}, {"energy": {**steady, "settled": False}}, {})
    assert "had not settled" in note


def test_what_is_not_installed_or_does_not_answer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    assert nvml(torch.device("cuda")) == "no NVML counter: pynvml is not installed (pip install nvidia-ml-py)"
    assert codecarbon("DEU") == "CodeCarbon is not installed (pip install codecarbon)"

    class Driver:
        def nvmlInit(self) -> None:  # noqa: N802
            raise OSError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert nvml(torch.device("cuda")) == "no NVML counter: OSError: driver not loaded"
    monkeypatch.setattr(energy, "counters", lambda device: (None, {"NVML": "no NVML counter: gone"}))
    model, samples = causal("llama")
    found = Energy(country="DEU", **SHORT).measure([Subject(model, bundle_of(samples))])[0]
    assert [(m.value, bool(m.reason)) for m in found.values()] == [(None, True)] * 3
    assert list(found) == ["energy", "energy_estimated", "co2"]


def package(root: Path, name: str, microjoules: int, most: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(str(microjoules))
    (folder / "max_energy_range_uj").write_text(str(most))
    return folder


def test_rapl_adds_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 900)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0, which would count twice
    meter = rapl(tmp_path)
    assert isinstance(meter, Rapl) and meter.packages == [first, second]
    meter.start()
    (first / "energy_uj").write_text("160")
    (second / "energy_uj").write_text("40")
    assert meter.stop() == Reading((60 + 140) / 1e6)
    meter.start()
    assert meter.stop().problem == "the RAPL counter did not move over a window"
    assert "has no intel-rapl" in str(rapl(tmp_path / "nowhere"))


class Library:
    """NVML with one GPU."""

    def __init__(self, *millijoules: int, processes: int = 1) -> None:
        self.values, self.processes = list(millijoules), processes

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:  # noqa: N802
        return self.values.pop(0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[int]:  # noqa: N802
        return [0] * self.processes


@pytest.mark.parametrize(
    ("library", "joules", "problem"),
    [
        (Library(1000, 3500), 2.5, None),
        (Library(1000, 1000), 0.0, "did not move"),
        (Library(1000, 500), -0.5, "did not move"),
        (Library(1000, 3500, processes=2), 2.5, "another process"),
    ],
)
def test_nvml_reads_millijoules_and_distrusts(library: Library, joules: float, problem: str | None) -> None:
    meter = Nvml(library, None)
    meter.start()
    found = meter.stop()
    assert found.joules == joules and (problem or "") in (found.problem or "") and bool(problem) == bool(found.problem)


def test_bad_input() -> None:
    model, samples = causal("llama")
    with pytest.raises(InputError, match="evals.energy.prompt_tokens=30"):
        Energy(prompt_tokens=30, new_tokens=4).check(model, bundle_of(samples))
    wrong: list[dict[str, Any]] = [{"country": "Germany"}, {"country": "deu"}, {"seconds": 0.0}, {"blocks": 0}]
    for settings in wrong:
        with pytest.raises(InputError):
            Energy(**settings)


def test_the_unit_of_a_seconds_window_is_work_done() -> None:
    pieces = []
    done = window(lambda: pieces.append(1), 7, Fake(0.0, 14.0), 0.0)
    assert done.units == 7 * len(pieces) and done.reading.joules / done.units == 2.0
