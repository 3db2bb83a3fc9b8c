"""The timer measures what it should, and identical models come out equal."""

import time

import pytest
import torch

from evals.timing import Protocol, Timings, speedup, spread_ms, time_interleaved

CPU = torch.device("cpu")


def test_a_known_sleep_is_measured() -> None:
    protocol = Protocol(warmup=2, blocks=2, seconds=0.1, least_calls=8)
    (timing,) = time_interleaved([lambda: time.sleep(0.01)], CPU, protocol)
    assert all(10 <= ms < 40 for ms in timing.all_ms)


def test_the_first_call_is_apart() -> None:
    calls: list[float] = []

    def cold_start() -> None:
        time.sleep(0.2 if not calls else 0.001)
        calls.append(0)

    (timing,) = time_interleaved([cold_start], CPU, Protocol(warmup=3, blocks=2, seconds=0.05))
    assert timing.first_ms >= 200 and max(timing.all_ms) < 150


def test_order_is_abba() -> None:
    order: list[str] = []
    calls = [lambda: order.append("A"), lambda: order.append("B")]
    time_interleaved(calls, CPU, Protocol(warmup=1, blocks=2, least_calls=4, most_calls=4))
    assert "".join(order[4:]) == "ABBA" * 2


def test_linear_drift_cancels_in_abba() -> None:
    """A machine that slows down steadily: AABB would see B slower, ABBA must not."""
    drift = [10.0 + 0.1 * step for step in range(8)]

    def timings(*blocks: tuple[int, int]) -> Timings:
        """Slots of three calls each, which drift on within the slot."""
        return Timings(0, [tuple([drift[slot] + d for d in (0, 0.01, 0.02)] for slot in b) for b in blocks])  # type: ignore[misc]

    abba = (timings((0, 3), (4, 7)), timings((1, 2), (5, 6)))
    aabb = (timings((0, 1), (4, 5)), timings((2, 3), (6, 7)))
    assert speedup(*abba) == pytest.approx(1.0)
    assert speedup(*aabb) < 0.99


def test_identical_calls_are_equally_fast_and_a_delay_is_seen() -> None:
    def work() -> None:
        time.sleep(0.003)  # asleep, so that a busy machine changes little

    def delayed() -> None:
        time.sleep(0.009)

    same = time_interleaved([work, work], CPU, Protocol(seconds=0.5))
    assert speedup(*same) == pytest.approx(1.0, abs=0.2)
    slower = time_interleaved([work, delayed], CPU, Protocol(seconds=0.3))
    assert speedup(*slower) < 0.6


def test_spread_by_hand() -> None:
    found = spread_ms([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == {"p10": 1.4, "p90": 4.6, "p99": None, "mean": 3.0, "std": pytest.approx(1.5811388), "n": 5}
    many = spread_ms([float(i) for i in range(1000)])
    assert many["p99"] == pytest.approx(989.01)
