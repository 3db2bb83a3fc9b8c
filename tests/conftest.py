"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import utils.config  # noqa: F401  (registers the root of the configuration)
from tests.faults import Runner, runner
from utils.composing import KeptRepository

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
    "data.calibration_batches=2", "evals.latency.seconds=0.01", "evals.latency.blocks=3",
    "evals.throughput.seconds=0.01", "evals.throughput.blocks=3",
)  # fmt: skip

Compose = Callable[..., DictConfig]
Command = Callable[..., CompletedProcess[str]]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most tests of the dearest adapter to `-m slow`."""
    for item in items:
        if DEAREST in item.name and item.path.name not in COVERING:
            item.add_marker(pytest.mark.slow)


def pytest_sessionstart() -> None:
    """Look for no garbage while modules are imported and tests collected."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let no garbage collection go through all that is imported and collected by now."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Some libraries complain of what is left when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for the session, so that a small model is trained once."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def runs() -> Iterator[Runner]:
    """Runs of main.py in forks of one process that has everything imported."""
    with runner() as found:
        yield found


@pytest.fixture(scope="session")
def forked(runs: Runner) -> Command:
    """The command line as `tests.test_cli.call` gives it, without the seconds that imports take."""

    def call(*arguments: str, cwd: Path, **variables: str) -> CompletedProcess[str]:
        (done,) = runs.run(cwd, arguments, whole=True, environments=[variables])
        return CompletedProcess(arguments, done.code, done.out, done.err)

    return call


@pytest.fixture(scope="session")
def kept_configs() -> dict[tuple[Any, ...], Any]:
    """What was read of the shipped configurations: each entry is read once."""
    return {}


@pytest.fixture
def composed(kept_configs: dict[tuple[Any, ...], Any]) -> Compose:
    """Compose a run at the shipped sizes."""
    return lambda *overrides: _composed(overrides, kept_configs)


@pytest.fixture
def small_config(shared_storage: Path, kept_configs: dict[tuple[Any, ...], Any]) -> Compose:
    """Compose a run that takes a second or two: overrides come on top of small sizes."""

    def composed(*overrides: str) -> DictConfig:
        kept = [s for s in SMALL if not any(_drops(s, o) for o in overrides)]
        return _composed([*kept, f"storage={shared_storage}", *overrides], kept_configs)

    return composed


def _composed(overrides: Sequence[str], kept: dict[tuple[Any, ...], Any]) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        loader.repository = KeptRepository(loader.repository.sources, kept)
        return compose("config", list(overrides))


def _drops(setting: str, override: str) -> bool:
    """Whether an override takes away the node that a setting belongs to."""
    return override.startswith("evals=") and setting.startswith("evals.")
