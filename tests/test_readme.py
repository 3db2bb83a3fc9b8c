"""The README's examples, written to the files it names and run as it says."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.faults import Runner, runner
from tests.test_cli import ROOT

FENCE = re.compile(r"```(python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
BLOCKS = {path: text for _, path, text in FENCE.findall((ROOT / "README.md").read_text())}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs of a copy of the project with the README's files added."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copy(ROOT / "main.py", copy)
    for folder in ("configs", "data", "evals", "models", "prune", "utils"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in BLOCKS.items():
        assert not (copy / path).exists(), f"{path} is an example, it must not be there yet"
        (copy / path).write_text(text)
    (copy / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "faults.py", copy / "tests")
    with runner(copy) as found:
        yield found


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
def test_the_examples_run(extended: Runner, arguments: tuple[str, ...], tmp_path: Path) -> None:
    kept = [a for a in arguments if not a.startswith(("evals.latency", "evals.throughput", "data.calibration"))]
    (done,) = extended.run(tmp_path, kept, whole=True)
    assert done.code == 0, done.err
    assert "accuracy" in done.out
