"""How long the newcomer's commands take: first run, second run, help, a mistake.

python -m benchmarks.main_job
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = Path(__file__).parent.parent / "main.py"


def seconds(folder: Path, *arguments: str, code: int = 0) -> float:
    """Wall time of one command in a folder of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(MAIN), *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode != code:
        raise RuntimeError(f"exit code {done.returncode}, expected {code}:\n{done.stderr}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            times.setdefault("first `python main.py`", []).append(seconds(folder))
            times.setdefault("second `python main.py`", []).append(seconds(folder))
            times.setdefault("`python main.py --help`", []).append(seconds(folder, "--help"))
            mistakes = ("prune.ratio=2", "prune.sparsit=1", "evals=[nosuch]")
            times.setdefault("three mistakes in the configuration", []).append(seconds(folder, *mistakes, code=2))
    print(f"| command | median s of {repeats} | slowest s |\n|---|--:|--:|")
    for what, found in times.items():
        print(f"| {what} | {statistics.median(found):.1f} | {max(found):.1f} |")


if __name__ == "__main__":
    main()
