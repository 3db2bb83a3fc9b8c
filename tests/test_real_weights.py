"""Published and trained weights on real data: dense figures as stated, and pruning that beats chance."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.report import Record
from main import run
from tests.conftest import Compose

DATA = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
DEIT = (
    "model=deit_tiny", f"model.checkpoint={DATA}/deit_tiny/deit_tiny_patch16_224.safetensors",
    "data=imagenet", f"data.root={DATA}/imagenet",
)  # fmt: skip
SST2 = ("model=bert", f"model.checkpoint={DATA}/bert_sst2", "data=glue", "data.task=sst2", f"data.root={DATA}/glue")
FEW = ("evals=[quality,macs]", "data.calibration_batches=4")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (PARE_DATA)")
Measure = Callable[..., Record]


@pytest.fixture
def measure(composed: Compose, tmp_path_factory: pytest.TempPathFactory, shared_storage: Path) -> Measure:
    """Run a recipe with the session's storage."""
    return lambda *overrides: run(
        composed(f"storage={shared_storage}", *FEW, *overrides), tmp_path_factory.mktemp("run")
    )


@pytest.mark.slow
def test_dense_deit_tiny_is_as_accurate_as_stated(measure: Measure) -> None:
    found = measure(*DEIT, "prune=none", "data.calibration_batches=1")
    assert found.dense["accuracy"].value == pytest.approx(0.8144, abs=0.002)
    assert found.dense["accuracy"].details["samples"] == 900
    assert found.dense["macs"].value == 1_253_683_200


def test_dense_bert_is_as_accurate_as_stated(measure: Measure) -> None:
    found = measure(*SST2, "prune=none")
    assert found.dense["accuracy"].value == pytest.approx(0.8016, abs=0.002)
    assert found.dense["accuracy"].details["samples"] == 872


def test_half_of_berts_macs_cost_little(measure: Measure) -> None:
    found = measure(*SST2, "prune=fisher", "prune.ratio=0.5")
    assert found.plan and 0.5 <= found.plan.ratio_reached < 0.501
    assert found.pruned["accuracy"].value == pytest.approx(0.8016, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_on_deit_fisher_beats_random(ratio: float, measure: Measure) -> None:
    found = {m: measure(*DEIT, f"prune={m}", f"prune.ratio={ratio}") for m in ("fisher", "random")}
    assert float(found["fisher"].pruned["accuracy"].value or 0) > float(found["random"].pruned["accuracy"].value or 0)
