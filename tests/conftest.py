"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import utils.config  # noqa: F401  (registers the root of the configuration)

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker a core: with a thread a core each, they would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# what covers the dearest adapter by default; its other tests are slow ones
DEAREST = "[mask2former"
COVERING = ("test_contract.py", "test_mask2former.py", "test_checkpoint.py", "test_experiments.py")

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = (
    "model.width=16", "model.depth=2", "model.heads=2", "model.neurons=12", "model.training.epochs=2",
    "data.calibration_batches=2", "evals.latency.seconds=0.05", "evals.throughput.seconds=0.05",
)  # fmt: skip

Compose = Callable[..., DictConfig]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most tests of the dearest adapter to `-m slow`."""
    for item in items:
        if DEAREST in item.name and item.path.name not in COVERING:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for the session, so that a small model is trained once."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def composed() -> Compose:
    """Compose a run at the shipped sizes."""

    def compose_it(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", list(overrides))

    return compose_it


@pytest.fixture
def small_config(shared_storage: Path) -> Compose:
    """Compose a run that takes a second or two: overrides come on top of small sizes."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            kept = [s for s in SMALL if not any(_drops(s, o) for o in overrides)]
            return compose("config", [*kept, f"storage={shared_storage}", *overrides])

    return composed


def _drops(setting: str, override: str) -> bool:
    """Whether an override takes away the node that a setting belongs to."""
    return override.startswith("evals=") and setting.startswith("evals.")
