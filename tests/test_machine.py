"""What a record says of the machine, and the warnings on times that follow from it."""

import pytest
import torch

from evals.notes import timing_notes
from evals.report import config_hash
from utils.machine import cpu_ticks, describe_machine, load_between, load_watched


def test_the_machine_is_described() -> None:
    found = describe_machine(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads() and "math" in found["sdpa_backends"] and found["gpu"] is None
    assert found["float32_matmul_precision"] in ("highest", "high", "medium")


def test_shares_of_the_processor_by_hand() -> None:
    found = load_between((100, 1000), (250, 1400), own_s=1.0, ticks_per_s=100)
    assert found == {"cpu_busy": 0.375, "cpu_own": 0.25, "cpu_others": 0.125}
    assert load_between(None, (1, 2), 1.0, 100)["cpu_busy"] is None
    assert load_between((1, 5), (1, 5), 1.0, 100)["cpu_others"] is None


def test_a_busy_process_is_seen() -> None:
    if cpu_ticks() is None:
        pytest.skip("this system does not tell")
    found: dict = {}
    with load_watched(torch.device("cpu"), found):
        sum(i * i for i in range(3_000_000))
    assert 0 < found["cpu_own"] <= 1.1 and found["cpu_busy"] > 0


def test_notes_say_what_is_wrong_with_times() -> None:
    good = {"latency": {"n": 5, "cv": 0.02, "warmup_stable": True}}
    assert timing_notes(good, good, {"cpu_others": 0.05}) == []
    restless = {"latency": {"n": 5, "cv": 0.5, "status": "unreliable", "dense_against_itself": 1.2, "isolated": True,
                            "warmup_stable": False}}  # fmt: skip
    notes = timing_notes(good, restless, {"cpu_others": 0.5})
    parts = ("latency of the pruned model 50%", "1.20x as fast as itself", "not interleaved", "not settled", "took 50%")
    assert len(notes) == 5 and all(part in note for part, note in zip(parts, notes, strict=True))


def test_the_hash_of_a_configuration() -> None:
    first = {"seed": 0, "prune": {"ratio": 0.4, "budget": "macs"}, "storage": "here"}
    same = {"prune": {"budget": "macs", "ratio": 0.4}, "storage": "there", "seed": 0}
    assert config_hash(first) == config_hash(same) != config_hash(first | {"seed": 1})
