"""Settings of a swept choice wait for its jobs."""

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode

from utils.compose import CommandLine
from utils.deferred import deferred
from utils.jobs import jobs_of
from utils.sweeping import prepared

CONFIGS = Path(__file__).parent.parent / "configs"
SWEPT = ["recover=finetune,distill", "recover.epochs=2", "prune.ratio=0.3"]


@pytest.fixture
def loader():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def test_a_key_of_a_swept_choice_waits_and_jobs_are_the_same(loader: ConfigLoader) -> None:
    with pytest.raises(ConfigCompositionException):
        loader.load_configuration("config", SWEPT, RunMode.MULTIRUN)
    instead = deferred(SWEPT, "config", loader)
    assert instead == {"recover.epochs=2": "recover.epochs=choice(2)"}
    told = [instead.get(override, override) for override in SWEPT]
    loader.load_configuration("config", told, RunMode.MULTIRUN)
    assert jobs_of(told, None, loader) == jobs_of(SWEPT, None, loader)
    assert len(jobs_of(told, None, loader)) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["recover=finetune", "recover.epochs=2", "prune.ratio=0.3,0.4"],
        ["recover=finetune,distill", "prune.ratio=0.3"],
        ["recover=finetune,distill", "recover.epochs=1,2"],
        ["recover=finetune,distill", "++recover.epochs=2", "+seed2=3"],
        ["recover=finetune,distill", "hydra.sweep.dir=x"],
    ],
)
def test_what_has_its_place_stays_as_it_was_typed(loader: ConfigLoader, overrides: list[str]) -> None:
    assert deferred(overrides, "config", loader) == {}


@pytest.mark.parametrize(
    "value", ["[refit,gates]", "'a, b'", '"q"', "{a:1,b:[1,2]}", "null", "1e-3", "${seed}", "true", "x y", "'1'", "''"]
)
def test_any_value_waits_whole(loader: ConfigLoader, value: str) -> None:
    typed = ["recover=distill,finetune", f"recover.own={value}"]
    told = [deferred(typed, "config", loader).get(override, override) for override in typed]
    assert told != typed
    parser = OverridesParser.create()
    for job, as_typed in zip(jobs_of(told, None, loader), jobs_of(typed, None, loader), strict=True):
        assert job[0] == as_typed[0]
        assert parser.parse_override(job[1]).value() == parser.parse_override(as_typed[1]).value()


def test_a_sweep_goes_on_by_the_words_it_was_started_with(tmp_path: Path) -> None:
    line = CommandLine(CONFIGS, overrides=[*SWEPT, f"hydra.sweep.dir={tmp_path}"], multirun=True)
    started = prepared(line, None)
    assert started is not None
    told = started.told(["-m", *SWEPT])
    assert told[:4] == ["-m", "recover=finetune,distill", "recover.epochs=choice(2)", "prune.ratio=0.3"]
    tasks = "".join(f"    - {override}\n" for override in told[1:4])
    (tmp_path / "multirun.yaml").write_text(f"hydra:\n  overrides:\n    task:\n{tasks}  sweeper:\n    params: null\n")
    again = prepared(line, tmp_path)
    assert again is not None and again.left == 2 and again.deferred == started.deferred
