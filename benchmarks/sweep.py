"""A sweep of four methods and three ratios, against what its rankings and evaluations take alone.

The rest is starting Python, importing torch, composing and checking, cutting, plots and
the sweep's own report. The plain way beside it: every job as a command of its own, which
ranks again.

python -m benchmarks.sweep
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.main_job import seconds

METHODS, RATIOS = ("taylor", "fisher", "magnitude", "random"), ("0.2", "0.4", "0.6")


def plain_way(folder: Path) -> float:
    """Each job by itself, with the trained model there but no ranking."""
    total = 0.0
    for method in METHODS:
        for ratio in RATIOS:
            for path in (folder / "storage").rglob("*"):
                if path.is_file() and not path.name.startswith("checkpoint"):
                    path.unlink()
            total += seconds(folder, f"prune={method}", f"prune.ratio={ratio}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds(folder, "evals=[]", "prune=none")  # trains the model, so that neither way has to
        swept = seconds(folder, "-m", f"prune.ratio={','.join(RATIOS)}", f"prune={','.join(METHODS)}")
        jobs = [json.loads(path.read_text()) for path in folder.glob("multirun/*/*/*/result.json")]
        shutil.rmtree(folder / "multirun")
        alone = plain_way(folder)
    report(jobs, swept, alone)


def report(jobs: list[dict[str, Any]], swept: float, alone: float) -> None:
    """Print the comparison as a Markdown table."""
    ranked = [job["seconds"]["rank"] for job in jobs if not job["cache"]["hit"]]
    ranking, evaluating = sum(ranked), sum(job["seconds"]["evaluate"] for job in jobs)
    print(f"| what, {len(jobs)} jobs | s |\n|---|--:|")
    print(f"| {len(ranked)} rankings (one a method) | {ranking:.2f} |\n| {len(jobs)} evaluations | {evaluating:.1f} |")
    print(f"| the sweep, wall time | {swept:.1f} |\n| the same jobs as single commands | {alone:.1f} |")
    print(f"\nThe sweep takes {swept / (ranking + evaluating):.2f}x its rankings and evaluations, "
          f"{alone / swept:.2f}x less than single commands.")  # fmt: skip


if __name__ == "__main__":
    main()
