"""The same contracts on a CUDA device; `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from evals.peak_memory import peak_on_cuda
from evals.timing import Protocol, time_interleaved
from main import run
from prune.rankers.fisher import Fisher
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.test_contract import random_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_masked_equals_cut_and_scores_match_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, samples = ADAPTERS[name]()
    expected = Fisher().rank(model, bundle_of(samples)).only()
    model.network.cuda()
    found = Fisher().rank(model, bundle_of(samples)).only()
    for group, values in expected.items():
        assert torch.allclose(found[group], values, rtol=1e-3, atol=1e-6)
    plan, placed = random_plan(model, 0), model.place(samples)
    with torch.inference_mode(), masked(model, plan):
        wanted = model.logits(placed)
    with torch.inference_mode():
        actual = cut(model, plan).logits(placed)
    assert (actual - wanted).abs().max() <= 1e-4


def test_a_whole_run(small_config: Compose, tmp_path: Path) -> None:
    record = run(small_config("device=cuda", "recover=finetune", "recover.epochs=2", "prune.ratio=0.2"), tmp_path)
    assert record.device["type"] == "cuda" and record.status == "ok"
    assert all(m.value is not None for m in record.pruned.values())


def test_a_known_allocation_and_a_known_wait_are_seen() -> None:
    size = 32 * 1024 * 1024
    assert peak_on_cuda(lambda: torch.empty(size, dtype=torch.uint8, device="cuda")) == size
    x = torch.randn(2048, 2048, device="cuda")

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(x, x)

    calls = [lambda: work(2), lambda: work(20)]
    short, long = time_interleaved(calls, torch.device("cuda"), Protocol(seconds=0.2))
    assert sum(long.all_ms) / len(long.all_ms) > 3 * sum(short.all_ms) / len(short.all_ms)
