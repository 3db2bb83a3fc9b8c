"""Progress: lines where there is no terminal, bars where there is one, and silence while a clock runs."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evals.base import Subject
from evals.energy_windows import Lengths, take_turns
from evals.latency import Latency
from evals.meters import Reading, Status
from evals.predictions import predictions_of
from evals.throughput import Throughput
from evals.timing import Protocol, steps_of, time_interleaved
from tests.adapters import ADAPTERS, bundle_of
from tests.test_cli import ROOT
from utils import files, progress
from utils.progress import followed, progress_bar, rate_text


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that remembers everything."""
    found = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    console = partial(Console, file=found, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda stderr: console())
    return found


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", 3) as advance:
        for _ in range(3):
            advance("loss 1")
    assert capsys.readouterr().err == ""


def test_long_work_is_a_line_every_ten_seconds_with_rate_and_time_left(clock: Clock, capsys) -> None:
    with progress_bar("train", 100) as advance:
        for _ in range(100):
            clock.now += 0.5
            advance("loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"train: {n} of 100, {50 - n // 2} s left (2.0/s) loss 1" for n in (20, 40, 60, 80, 100)]
    with progress_bar("guessed", 1) as advance:
        for _ in range(3):
            clock.now += 11
            advance("")
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "guessed: 1 of 1", "guessed: 2 of 2", "guessed: 3 of 3",
    ]  # fmt: skip


def test_resumed_work_says_from_where_and_counts_its_own_steps_alone(clock: Clock, capsys) -> None:
    with progress_bar("recover", 8, done=3) as advance:
        clock.now += 30
        advance("")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "recover: goes on after 3 of 8" and second == "recover: 4 of 8, 120 s left (2.0/min)"


def test_lines_of_work_inside_work_share_one_clock(clock: Clock, capsys) -> None:
    with progress_bar("outer", 2) as outer:
        for _ in range(2):
            with progress_bar("inner", 12) as inner:
                for _ in range(12):
                    clock.now += 1
                    inner("")
            outer("")
    said = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["inner: 10 of 12"] * 2, "10 s and 22 s after the start; the outer one has no turn in between"
    with progress_bar("outer", 4) as outer:
        for _ in range(4):
            for _ in followed("quick", range(3)):
                clock.now += 2
            outer("")
    said = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["outer: 2 of 4", "outer: 4 of 4"], "what is quick inside says nothing"


def test_items_are_followed_and_an_error_leaves_nothing_behind(clock: Clock, capsys) -> None:
    seen = []
    for item in followed("read", range(3)):
        clock.now += 11
        seen.append(item)
    assert seen == [0, 1, 2] and capsys.readouterr().err.count("read: ") == 3
    with pytest.raises(ZeroDivisionError), progress_bar("broken", 1):
        raise ZeroDivisionError
    assert progress._shown.get() is None


@pytest.mark.parametrize(("speed", "text"), [(2.0, "2.0/s"), (0.5, "30.0/min"), (0.001, "3.6/h"), (0.0, "")])
def test_slow_work_has_a_rate_too(speed: float, text: str) -> None:
    assert rate_text(speed) == text


def test_a_terminal_shows_bar_rate_and_time_left(screen: io.StringIO, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", 0.0)
    with progress_bar("train", 50) as advance, progress_bar("inner", 4) as inner:
        for _ in range(10):
            time.sleep(0.03)
            advance("loss 1")
        inner("")
    drawn = screen.getvalue()
    assert "train" in drawn and "━" in drawn and "10/50" in drawn and "loss 1" in drawn and "inner" in drawn
    assert re.search(r"\d+\.\d/s", drawn) and re.search(r"\d:\d\d", drawn)


def test_quick_work_leaves_a_terminal_as_it_was(screen: io.StringIO) -> None:
    with progress_bar("train", 3) as advance:
        advance("")
    assert screen.getvalue() == ""


def test_an_error_ends_the_bar(screen: io.StringIO, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", 0.0)
    with pytest.raises(ZeroDivisionError), progress_bar("train", 3):
        time.sleep(0.05)
        raise ZeroDivisionError
    drawn = screen.getvalue()
    time.sleep(0.3)
    assert screen.getvalue() == drawn and drawn.endswith("\x1b[?25h"), "the cursor is back, and nothing draws on"


def watched(screen: io.StringIO, work: Callable[[], object]) -> tuple[Callable[[], None], list[int]]:
    """A call that notes what is drawn while it runs."""
    drawn: list[int] = []

    def call() -> None:
        before = screen.tell()
        time.sleep(0.004)
        work()
        drawn.append(screen.tell() - before)

    return call, drawn


def test_nothing_is_drawn_while_a_clock_runs(screen: io.StringIO) -> None:
    call, drawn = watched(screen, lambda: None)
    protocol = Protocol(warmup=4, blocks=30, seconds=0.5, least_calls=60)
    with progress_bar("latency", steps_of(protocol, 1), still=True) as advance:
        time_interleaved([call], torch.device("cpu"), protocol, advance)
    assert set(drawn) == {0} and len(drawn) > 60
    assert len(re.findall("latency", screen.getvalue())) > 3, "and the bar moves all the same"


def test_nothing_is_drawn_in_a_window_of_energy(screen: io.StringIO) -> None:
    call, drawn = watched(screen, lambda: None)

    class Meter:
        name = "fake"
        status: Status = "measured"

        def start(self) -> None:
            self.before = screen.tell()

        def stop(self) -> Reading:
            assert screen.tell() == self.before
            return Reading(1.0)

    take_turns([call, call], 1, Meter(), Lengths(0.15, 0.15, 0.3), blocks=1)
    assert set(drawn) == {0} and "energy" in screen.getvalue()


@pytest.mark.parametrize("metric", [Latency(seconds=0.1), Throughput(seconds=0.1, batch="auto", largest=2)])
def test_timed_metrics_show_a_bar_around_their_clocks(screen: io.StringIO, metric: Latency | Throughput) -> None:
    model, samples = ADAPTERS["toy_images"]()
    logits, drawn = model.logits, list[int]()

    def silent(batch):
        before = screen.tell()
        found = logits(batch)
        drawn.append(screen.tell() - before)
        return found

    model.logits = silent  # type: ignore[method-assign]
    metric.measure([Subject(model, bundle_of(samples))])
    assert type(metric).__name__.lower() in screen.getvalue() and set(drawn) == {0}
    assert ("saturating batch" in screen.getvalue()) == (metric.batch == "auto")


def test_steps_are_those_that_are_told() -> None:
    for models, precision in ((1, None), (2, None), (2, 1e-9)):
        protocol = Protocol(warmup=1, blocks=3, seconds=0.01, least_calls=6, precision=precision, longest=0.02)
        told: list[str] = []
        time_interleaved([lambda: time.sleep(0.001)] * models, torch.device("cpu"), protocol, told.append)
        planned = steps_of(protocol, models)
        assert len(told) == planned if precision is None else planned > 7 * models <= len(told)


def test_evaluation_counts_batches(clock: Clock, capsys) -> None:
    model, samples = ADAPTERS["toy_images"]()
    logits = model.logits

    def slow(batch):
        clock.now += 11
        return logits(batch)

    model.logits = slow  # type: ignore[method-assign]
    data = bundle_of(samples)
    found = predictions_of(model, data)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(found) and lines[-1].startswith(f"answers of {model.name}: {len(found)} of {len(found)}")


def test_what_is_written_in_one_call_grows_on_the_bar(screen: io.StringIO, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("SECONDS_BEFORE_A_BAR", 0.0), ("SECONDS_BETWEEN_LOOKS", 0.01), ("LARGE", 10)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(progress, "MEGABYTE", 1)
    with progress.growing("save", tmp_path, 20), (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(4):
            file.write(b"12345")
            time.sleep(0.2)
    assert re.search(r"\b(5|10|15)/20", screen.getvalue()) and "20/20" in screen.getvalue()
    drawn = screen.getvalue()
    with progress.growing("small", tmp_path, 5):
        pass
    assert screen.getvalue() == drawn


def test_large_files_are_written_whole_piece_by_piece(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LARGE", 10)
    monkeypatch.setattr(files, "PIECE", 7)
    content = os.urandom(100)
    files.write_atomically(tmp_path / "large", content)
    assert (tmp_path / "large").read_bytes() == content


SHOWN = """
import time
from utils import progress
progress.SECONDS_BEFORE_A_BAR = 0.0
with progress.progress_bar("rank", 5) as advance:
    for _ in range(5):
        time.sleep(0.05)
        advance("")
"""


def test_a_real_pseudo_terminal_gets_a_bar_and_a_pipe_none(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(SHOWN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, str(script)], stderr=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "rank" in drawn and "5/5" in drawn and "/s" in drawn
    piped = subprocess.run([sys.executable, str(script)], capture_output=True, env=environment, timeout=60, check=True)
    assert piped.stderr == b""
