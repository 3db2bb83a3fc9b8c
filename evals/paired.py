"""Accuracies compared sample by sample: `python -m evals.paired REFERENCE RUN RUN ...`.

Each argument is a run's folder, or a sweep's, whose jobs stand for one method under several seeds. All must have
answered the same validation samples, and have left which they answered rightly (evals=[accuracy] or [quality]).
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from evals.compare import jobs_of, read_result
from evals.each_sample import ENDING, TENSOR
from evals.side_files import file_name
from utils.errors import InputError


@dataclass(frozen=True)
class Answers:
    """What one method answered rightly.

    Attributes:
        name: Method and what was set of it.
        right: 1 where a seed's run answers a sample rightly, (S, N).
        validation: Fingerprint of the samples.
    """

    name: str
    right: np.ndarray
    validation: str


@dataclass(frozen=True)
class Difference:
    """A method against the reference, in fractions.

    Attributes:
        accuracy: Mean over seeds and samples.
        over_seeds: Standard error of that mean over the seeds; None for one seed.
        difference: To the reference.
        paired: Standard error of the difference over the samples, each sample's answers first averaged over the seeds.
    """

    accuracy: float
    over_seeds: float | None
    difference: float
    paired: float


def against(right: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare two methods on the same samples.

    Args:
        right: 1 where a seed's run is right, (S, N).
        reference: The same of the reference, (R, N).

    Raises:
        ValueError: If the numbers of samples differ, or there are fewer than two.
    """
    if right.ndim != 2 or reference.ndim != 2 or right.shape[1] != reference.shape[1] or right.shape[1] < 2:
        raise ValueError(f"right {right.shape} and reference {reference.shape} must be (S, N) and (R, N), N at least 2")
    each = right.mean(axis=0) - reference.mean(axis=0)  # (N,)
    seeds = right.mean(axis=1)  # (S,)
    spread = float(seeds.std(ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return Difference(
        float(right.mean()), spread, float(each.mean()), float(each.std(ddof=1)) / math.sqrt(right.shape[1])
    )


def answers_of(folder: Path) -> Answers:
    """Which samples the jobs of a folder answered rightly.

    Raises:
        InputError: If a job left no such file, or its jobs answered other samples.
    """
    jobs = jobs_of(folder)
    results = [read_result(job) for job in jobs]
    split = {str(result["data"]["fingerprints"]["validation"]) for result in results}
    if len(split) > 1:
        raise InputError(f"evals.paired: {folder}: its jobs must answer the same validation samples; these are others")
    words = sorted({w for r in results for w in shlex.split(r["command"]) if w.startswith(("prune.", "recover"))})
    return Answers(", ".join([str(results[0]["method"]), *words]), np.stack([*map(_right, jobs)]), split.pop())


def _right(job: Path) -> np.ndarray:
    path = job / file_name("pruned", "accuracy", ENDING)
    if not path.is_file():
        raise InputError(f"evals.paired: {path} is missing; run again with evals=[accuracy]")
    return load(path.read_bytes())[TENSOR].astype(np.float64)


def compared(folders: Sequence[Path]) -> list[tuple[Answers, Difference]]:
    """Every folder against the first.

    Raises:
        InputError: If they answered other samples.
    """
    found = [answers_of(folder) for folder in folders]
    for folder, answers in zip(folders, found, strict=True):
        if answers.validation != found[0].validation:
            raise InputError(f"evals.paired: {folder} was validated on other samples than {folders[0]}")
    return [(answers, against(answers.right, found[0].right)) for answers in found]


def markdown(rows: Sequence[tuple[Answers, Difference]]) -> str:
    """The comparison as a table, in percent and points."""
    lines = ["| method | seeds | accuracy (over seeds) | against the first (paired) |", "|---|--:|--:|--:|"]
    for number, (answers, found) in enumerate(rows):
        spread = "" if found.over_seeds is None else f" ({100 * found.over_seeds:.2f})"
        against_first = f"{100 * found.difference:+.2f} ± {100 * found.paired:.2f}" if number else ""
        lines.append(
            f"| {answers.name} | {len(answers.right)} | {100 * found.accuracy:.2f}{spread} | {against_first} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 if the runs can't be compared."""
    parser = argparse.ArgumentParser(prog="python -m evals.paired", description="Compare accuracies sample by sample.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run or sweep; the first is compared with")
    try:
        print(markdown(compared(parser.parse_args(arguments).runs)), end="")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
