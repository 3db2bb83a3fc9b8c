"""Every shipped experiment composes, checks, and runs with a small model."""

from pathlib import Path

import pytest

from main import run
from tests.conftest import CONFIGS, Compose

NAMES = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
SMALL_DATA = {
    "random_tokens": (
        "data.train_samples=64",
        "data.validation_samples=32",
        "data.calibration_batch_size=8",
        "data.tokens=6",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_small(name: str, small_config: Compose, tmp_path: Path) -> None:
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python main.py +experiment={name}\n")
    small = next((s for data, s in SMALL_DATA.items() if f"/data: {data}" in text), ())
    training = [f"recover.epochs={2}"] if "/recover: " in text and "/recover: none" not in text else []
    record = run(small_config(f"+experiment={name}", *small, *training, "prune.ratio=0.1"), tmp_path)
    assert record.status == "ok" and record.name == name and record.plan and not record.plan.is_identity
