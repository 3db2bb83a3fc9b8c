"""Progress bars that say how fast and how long; elsewhere than on a terminal, a line now and then.

Bars may lie inside each other: the inner ones are rows below the outer one, which decides how they are drawn.
"""

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from utils.launched import speaks

Advance = Callable[[str], None]
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.1
SECONDS_BEFORE_A_BAR = 1.0
SECONDS_BETWEEN_LOOKS = 0.5
MEGABYTE = 10**6
LARGE = 64 * MEGABYTE

T = TypeVar("T")


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, still: bool = False) -> Iterator[Advance]:
    """Show a bar of `total` steps; call the yielded function once a step with a short note.

    Args:
        title: What is done.
        total: Steps in all; about, where that is not known.
        done: Steps that an earlier process has done.
        still: Draw nothing but when a step is done, for work that a clock or a meter watches: a bar that is drawn
            all the time takes part of the processor. Such a bar vanishes at its end.
    """
    if not speaks():
        yield lambda note: None
        return
    if done:
        print(f"{title}: goes on after {done} of {total}", file=sys.stderr, flush=True)
    if (outer := _shown.get()) is not None:
        with outer.row(title, total, done) as advance:
            yield advance
        return
    with _display(still) as display:
        token = _shown.set(display)
        try:
            with display.row(title, total, done) as advance:
                yield advance
        finally:
            _shown.reset(token)


def followed(title: str, items: Iterable[T]) -> Iterator[T]:
    """The same items, with a bar that goes on when the next one is asked for; not to be left half way."""
    with progress_bar(title, len(items) if isinstance(items, Sized) else 0) as advance:
        for item in items:
            yield item
            advance("")


@contextmanager
def growing(title: str, folder: Path, size: int) -> Iterator[None]:
    """A bar, in megabytes, of what is written into a folder inside a `with`; for what writes in one long call.

    Args:
        title: What is done.
        folder: Where files grow.
        size: Bytes that there will be; below 64 MB there is no bar.
    """
    if size < LARGE:
        yield
        return
    ended, seen = threading.Event(), 0
    with progress_bar(f"{title} (MB)", size // MEGABYTE) as advance:

        def follow() -> None:
            nonlocal seen
            now = min(size, sum(path.stat().st_size for path in folder.iterdir())) // MEGABYTE
            for _ in range(now - seen):
                advance("")
            seen = max(seen, now)

        def watch() -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                with suppress(OSError):  # a file may be renamed meanwhile
                    follow()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


class _Display(ABC):
    """Where rows are shown."""

    @abstractmethod
    def row(self, title: str, total: int, done: int) -> AbstractContextManager[Advance]:
        """Show one more row."""


_shown: ContextVar[_Display | None] = ContextVar("progress", default=None)


@contextmanager
def _display(still: bool) -> Iterator[_Display]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), LeftColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    bar = Progress(*columns, console=console, auto_refresh=not still, transient=still)
    with _started(bar) if still else _started_late(bar):
        yield _Terminal(bar, still)


@contextmanager
def _started(bar: Progress) -> Iterator[None]:
    with bar:
        yield


@contextmanager
def _started_late(bar: Progress) -> Iterator[None]:
    """Show a bar once work has taken a while, so that quick work leaves nothing on the screen."""
    lock, ended = threading.Lock(), threading.Event()

    def start() -> None:
        with lock:
            if not ended.is_set():
                bar.start()

    timer = threading.Timer(SECONDS_BEFORE_A_BAR, start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended.set()
            if bar.live.is_started:
                bar.stop()


class _Terminal(_Display):
    """Rows of bars."""

    def __init__(self, bar: Progress, still: bool) -> None:
        self.bar, self.still, self.drawn = bar, still, 0.0

    @contextmanager
    def row(self, title: str, total: int, done: int) -> Iterator[Advance]:
        outermost = not self.bar.task_ids
        task = self.bar.add_task(title, total=total, completed=done, note="", first=done)
        self._draw(at_once=True)

        steps = done

        def advance(note: str = "") -> None:
            nonlocal steps
            steps += 1
            self.bar.update(task, completed=steps, total=max(total, steps), note=note)
            self._draw()

        try:
            yield advance
        finally:
            if not outermost:
                self.bar.remove_task(task)

    def _draw(self, at_once: bool = False) -> None:
        """Draw where no thread does it."""
        now = time.monotonic()
        if self.still and (at_once or now - self.drawn >= SECONDS_BETWEEN_DRAWINGS):
            self.drawn = now
            self.bar.refresh()


class _Log(_Display):
    """Lines in a log file: quick work says nothing, long work a line every 10 s, whatever lies inside it."""

    def __init__(self) -> None:
        self.last, self.depth = time.monotonic(), 0

    @contextmanager
    def row(self, title: str, total: int, done: int) -> Iterator[Advance]:
        start, steps, inner = time.monotonic(), done, self.depth > 0

        def advance(note: str = "") -> None:
            nonlocal steps
            steps += 1
            now = time.monotonic()
            # what is quick inside of long work leaves the word to that
            if now - max(self.last, start if inner else self.last) >= SECONDS_BETWEEN_LINES:
                self.last = now
                each = (now - start) / (steps - done)
                left = f"{max(0, total - steps) * each:.0f} s left ({rate_text(1 / each if each else 0)})"
                said = f"{title}: {steps} of {max(total, steps)}, {left} {note}".rstrip()
                print(said, file=sys.stderr, flush=True)

        self.depth += 1
        try:
            yield advance
        finally:
            self.depth -= 1


class RateColumn(ProgressColumn):
    """Steps per second, minute or hour."""

    def render(self, task: Task) -> Text:
        """Show the rate once it is known."""
        return Text(rate_text(_speed(task)), style="dim")


class LeftColumn(ProgressColumn):
    """Time left; at the end, time taken."""

    def render(self, task: Task) -> Text:
        """Show minutes and seconds once the rate is known."""
        speed = _speed(task)
        if task.finished:
            return Text(_clock(task.finished_time or 0.0), style="progress.elapsed")
        left = _clock((task.remaining or 0.0) / speed) if speed else "--:--"
        return Text(left, style="progress.remaining")


def _speed(task: Task) -> float:
    """Steps per second: of the last half minute; where steps take longer than that, of all."""
    if recent := task.finished_speed or task.speed:
        return recent
    steps = task.completed - task.fields["first"]
    return steps / task.elapsed if task.elapsed else 0.0


def rate_text(speed: float) -> str:
    """A number of steps per second in a unit in which it is no tiny fraction; empty for none."""
    if speed <= 0:
        return ""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (60, "min")) if speed * s >= 1), (3600, "h"))
    return f"{speed * scale:.1f}/{unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
