"""Joules of phases: exact from a known counter, an estimate only where it was asked for, null with a reason else."""

import json
from pathlib import Path

import pytest
import torch

import evals.phase_energy as phase_energy
from evals.meters import Reading, Status
from evals.phase_energy import Joules, PhaseEnergy
from tests.conftest import Compose
from utils.errors import InputError

CPU = torch.device("cpu")


class Fake:
    """A counter that gains so many joules a window, the last figure ever after."""

    name = "fake"
    status: Status = "measured"

    def __init__(self, *joules: float, problem: str | None = None) -> None:
        self.joules, self.problem, self.count = joules, problem, -1

    def start(self) -> None:
        self.count += 1

    def stop(self) -> Reading:
        return Reading(self.joules[min(self.count, len(self.joules) - 1)], problem=self.problem)


class Estimating(Fake):
    """CodeCarbon's place."""

    name = "guess"
    status: Status = "estimated"


class Broken(Fake):
    """A counter whose driver goes away."""

    def stop(self) -> Reading:
        raise OSError("gone")


def with_counter(monkeypatch: pytest.MonkeyPatch, found: Fake | None, estimate: Fake | str = "not installed") -> None:
    missing = {} if found else {"RAPL": "no RAPL counter: nothing there"}
    monkeypatch.setattr(phase_energy, "counters", lambda device: (found, missing))
    monkeypatch.setattr(phase_energy, "codecarbon", lambda country: estimate)


def metered(energy: PhaseEnergy, *phases: str) -> dict[str, dict[str, object]]:
    for name in phases:
        with energy.phase(name):
            pass
    return energy.to_json(["rank", "cut", "recover"])


def test_a_counter_adds_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counter(monkeypatch, Fake(3.0, 5.0, 7.0))
    energy = PhaseEnergy()
    energy.begin(CPU, "estimate")
    found = metered(energy, "rank", "cut", "rank")
    assert found["rank"] == {"value": 10.0, "unit": "J", "status": "measured", "meter": "fake"}
    assert found["cut"]["value"] == 5.0
    assert found["recover"]["value"] is None and "did not run" in str(found["recover"]["reason"])
    assert energy.in_words(["rank", "cut", "recover"]) == ["Joules (measured, fake): rank 10, cut 5."]


def test_an_estimate_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counter(monkeypatch, None, Estimating(4.0))
    cases: tuple[tuple[Joules, float | None, str], ...] = (("counters", None, "null"), ("estimate", 4.0, "estimated"))
    for asked, value, status in cases:
        energy = PhaseEnergy()
        energy.begin(CPU, asked)
        found = metered(energy, "rank")["rank"]
        assert (found["value"], found["status"]) == (value, status)
        if value is None:
            assert "no RAPL counter" in str(found["reason"]) and "joules=estimate" in str(found["reason"])
            assert energy.in_words(["rank"]) == []
    with_counter(monkeypatch, None, "CodeCarbon is not installed")
    energy = PhaseEnergy()
    energy.begin(CPU, "estimate")
    assert "CodeCarbon is not installed" in str(metered(energy, "rank")["rank"]["reason"])


def test_a_meter_that_fails_costs_only_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counter(monkeypatch, Broken(1.0))
    energy = PhaseEnergy()
    energy.begin(CPU, "counters")
    found = metered(energy, "rank")["rank"]
    assert found["value"] is None and "OSError: gone" in str(found["reason"])
    with_counter(monkeypatch, Fake(0.0, problem="it did not move"))
    energy = PhaseEnergy()
    energy.begin(CPU, "counters")
    assert metered(energy, "rank")["rank"]["reason"] == "too short for fake", "a counter may stand still so shortly"
    monkeypatch.setattr(phase_energy, "RESOLVED_S", 0.0)
    assert metered(energy, "cut")["cut"]["reason"] == "it did not move"


def test_an_error_inside_a_phase_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counter(monkeypatch, Fake(2.0))
    energy = PhaseEnergy()
    energy.begin(CPU, "counters")
    with pytest.raises(InputError, match="as it was"), energy.phase("rank"):
        raise InputError("as it was")
    assert energy.to_json(["rank"])["rank"]["value"] == 2.0


def test_a_run_says_what_its_phases_took(
    small_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from main import run

    with_counter(monkeypatch, None, Estimating(4.0))
    settings = ("evals=[macs]", "recover=finetune", "recover.epochs=1", "joules=estimate")
    run(small_config(*settings), tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())["joules"]
    assert set(found) == {"train", "rank", "search", "cut", "recover", "evaluate"}
    assert all(found[phase]["status"] == "estimated" and found[phase]["value"] == 4.0 for phase in found)
    assert "Joules (estimated, guess): " in (tmp_path / "report.md").read_text()
