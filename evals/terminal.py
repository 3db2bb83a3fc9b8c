"""What a run prints at its end."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.base import Measurements
from evals.report import Record
from evals.table import rows


def print_record(record: Record, out: Path) -> None:
    """Print what a run found, and where it left its files; in one piece, as jobs may run side by side."""
    console = Console()
    with console.capture() as captured:
        _print_record(console, record, out)
    sys.stdout.write(captured.get())
    sys.stdout.flush()


def _print_record(console: Console, record: Record, out: Path) -> None:
    for note in record.warnings():
        console.print(f"[yellow]note[/yellow] {escape(note)}")
    console.print(terminal_table(record.dense, record.pruned))
    plan = record.plan
    if plan and plan.budget:
        console.print(f"{plan.ratio_reached:.2%} of the {plan.budget} removed ({plan.ratio_asked:.2%} asked)")
    if record.saved:
        console.print(escape(record.saved), soft_wrap=True)
    seconds = f"{record.seconds['total']:.1f} s in all"
    console.print(f"{record.scores_from()}, {seconds}; everything else is in {out}/report.md", soft_wrap=True)


def terminal_table(dense: Measurements, pruned: Measurements) -> Table:
    """The table that a run prints at its end."""
    table = Table("metric", title="dense against pruned", title_justify="left")
    for heading in ("dense", "pruned", "change", "unit"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for row in rows(dense, pruned):
        table.add_row(*map(escape, row))
    return table
