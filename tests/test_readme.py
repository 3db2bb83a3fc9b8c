"""The README's examples, written to the files it names and run as it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.test_cli import ROOT

FENCE = re.compile(r"```(python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
BLOCKS = {path: text for _, path, text in FENCE.findall((ROOT / "README.md").read_text())}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the README's files added."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copy(ROOT / "main.py", copy)
    for folder in ("configs", "data", "evals", "models", "prune", "utils"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in BLOCKS.items():
        assert not (copy / path).exists(), f"{path} is an example, it must not be there yet"
        (copy / path).write_text(text)
    return copy


def test_each_part_is_short() -> None:
    assert len(BLOCKS) == 8, "a file and a yaml for method, data set, metric and model"
    assert all(len(text.splitlines()) <= 40 for text in BLOCKS.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune=loudness", "prune.ratio=0.3", *SMALL, "evals=[accuracy,confidence]"),
        ("data=stripes", *SMALL, "evals=[accuracy]"),
        ("model=perceptron", "model.training.epochs=2", "evals=[accuracy,macs]"),
    ],
    ids=["method and metric", "data", "model"],
)
def test_the_examples_run(extended: Path, arguments: tuple[str, ...]) -> None:
    kept = [a for a in arguments if not a.startswith(("evals.latency", "evals.throughput", "data.calibration"))]
    done = subprocess.run([sys.executable, "main.py", *kept], cwd=extended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
