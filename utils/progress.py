"""Progress bars that say how fast and how long; elsewhere than on a terminal, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from utils.launched import speaks

Advance = Callable[[str], None]
SECONDS_BETWEEN_LINES = 10.0


class RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Show the rate once it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="dim")


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show a bar of `total` steps; call the yielded function once a step with a short note."""
    if not speaks():
        yield lambda note: None
        return
    if done:
        print(f"{title}: goes on after {done} of {total}", file=sys.stderr, flush=True)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


def _lines(title: str, total: int, done: int) -> Advance:
    """Progress for a log file: quick work says nothing, long work a line every 10 s."""
    start = last = time.monotonic()
    steps = done

    def advance(note: str = "") -> None:
        nonlocal steps, last
        steps += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / (steps - done) * (total - steps)
            print(f"{title}: {steps} of {total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
