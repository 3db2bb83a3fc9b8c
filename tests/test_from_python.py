"""`from main import run` with an ordinary dictionary: the same configuration, the same check, the same run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from main import CONFIGS, run
from prune.optin.published_config import expanded
from tests.conftest import Compose
from utils.compose import CommandLine, command_line_problems
from utils.errors import InputError
from utils.from_python import configured, dated_folder, overrides_of

TEXTS = ["plain", "it's", 'a "quote"', "back\\slash", "ends in \\", "\\'", "a,b", "[x]", "{y: 1}", "true", "null",
         "0.5", "2:4", "aü", "/a/b.c", ".5", "NaN", " spaced ", "k=v", "", "a: b", "1e3", "(z)",
         "~x", "ünï"]  # fmt: skip
SMALL_VALUES = {
    "model.width": 16, "model.depth": 2, "model.heads": 2, "model.neurons": 12, "model.training.epochs": 2,
    "data.calibration_batches": 2, "evals.latency.seconds": 0.01, "evals.throughput.seconds": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_arrives_as_it_was(text: str) -> None:
    cfg, command = configured({"name": text}, CONFIGS)
    assert cfg.name == text and shlex.split(command)[2].startswith("name=")


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"experiment": "digits_optin", "prune.ratio": 0.4}, ["+experiment=digits_optin", "prune.ratio=0.4"]),
        ({"prune": {"ratio": 0.3, "kinds": ["head"]}}, ["prune.ratio=0.3", "prune.kinds=[head]"]),
        ({"prune": "taylor", "evals": ["accuracy", "macs"]}, ["prune=taylor", "evals=[accuracy,macs]"]),
        ({"save": True, "prune.kinds": None, "seed": 3}, ["save=true", "prune.kinds=null", "seed=3"]),
        ({"storage": Path("kept"), "~evals.latency": None}, ["storage=kept", "~evals.latency"]),
        ({"+data@data.calibration": "c4"}, ["+data@data.calibration=c4"]),
        ({"evals.lm_eval.tasks": {"piqa": 0}}, ["evals.lm_eval.tasks={piqa: 0}"]),
        ({"evals.decode.batches": (1, 4)}, ["evals.decode.batches=[1,4]"]),
    ],
)
def test_keys_and_values_as_on_the_command_line(values: dict, overrides: list[str]) -> None:
    assert overrides_of(values) == overrides


def test_the_configuration_is_the_command_lines(composed: Compose) -> None:
    values = {"experiment": "digits_optin", "prune.ratio": 0.25, "evals": ["accuracy", "macs"], "seed": 2}
    cfg, command = configured(values, CONFIGS)
    same = composed("+experiment=digits_optin", "prune.ratio=0.25", "evals=[accuracy,macs]", "seed=2")
    assert OmegaConf.to_container(cfg, resolve=True) == OmegaConf.to_container(same, resolve=True)
    assert command == "python main.py +experiment=digits_optin prune.ratio=0.25 'evals=[accuracy,macs]' seed=2"
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"prune.rato": 0.4, "prune.ratio": 2, "seed": "x"}, ["did you mean 'ratio'", "in [0, 1)", "whole number"]),
        ({"experiment": "digits_optn"}, ["did you mean 'digits_optin'"]),
        ({"prune.ratio": [0.1, 0.2]}, ["prune.ratio=[0.1, 0.2]: must be a finite number"]),
        ({"prune.ratio": "0.1,0.2"}, ["must be a finite number"]),
        ({"prune.ratio": float("nan")}, ["must be a finite number"]),
        ({"prune.ratio": object()}, ["must be text, a number"]),
        ({"hydra.run.dir": "x"}, ["out= says where"]),
        ({7: 1}, ["7: must be a key"]),
        ({"prune": ["optin", "fisher"]}, ["takes one option"]),
    ],
)  # fmt: skip
def test_every_mistake_is_an_input_error_before_any_work(values: dict, lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        run(values, out=tmp_path / "out")
    assert all(line in str(error.value) for line in lines) and len(str(error.value).splitlines()) == len(lines)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_those_of_the_command_line() -> None:
    overrides = ["prune.rato=0.4", "prune.ratio=2"]
    expected = command_line_problems(CommandLine(CONFIGS, overrides=overrides))
    with pytest.raises(InputError) as error:
        configured({"prune.rato": 0.4, "prune.ratio": 2}, CONFIGS, expanded)
    assert str(error.value).splitlines() == expected


def test_a_run_leaves_what_the_command_leaves(shared_storage: Path, tmp_path: Path) -> None:
    values = {**SMALL_VALUES, "prune.ratio": 0.2, "storage": shared_storage}
    record = run(values, out=str(tmp_path / "somewhere"))
    found = json.loads((tmp_path / "somewhere" / "result.json").read_text())
    assert record.status == found["status"] == "ok" and found["config"]["prune"]["ratio"] == 0.2
    assert found["command"].startswith("python main.py model.width=16") and "prune.ratio=0.2" in found["command"]
    assert (tmp_path / "somewhere" / "report.md").is_file()


def test_without_a_folder_there_is_a_dated_one(
    shared_storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dated_folder().parts[0] == "outputs" and dated_folder() != dated_folder()
    monkeypatch.chdir(tmp_path)
    values = {k: v for k, v in SMALL_VALUES.items() if not k.startswith("evals.")}
    run({**values, "evals": ["params"], "storage": shared_storage})
    assert len(list(tmp_path.glob("outputs/*/*/result.json"))) == 1


def test_a_configuration_of_hydra_is_taken_as_before(small_config: Compose, tmp_path: Path) -> None:
    record = run(small_config("evals=[params]"), tmp_path, command="python main.py x")
    assert record.command == "python main.py x" and record.status == "ok"


def test_a_sweeps_own_values_give_way_to_typed_ones() -> None:
    line = lambda *typed: CommandLine(CONFIGS, overrides=["+experiment=tiny_llama_benchmark", *typed], multirun=True)  # noqa: E731
    assert (
        command_line_problems(line()) == [] and command_line_problems(line("prune=wanda", "prune.ratio=0.1,0.3")) == []
    )
    problems = command_line_problems(line("prune.ratio=7"))
    assert problems and all("prune.ratio=7" in problem for problem in problems)


def test_importing_it_is_light() -> None:
    code = "import sys, main; assert 'torch' not in sys.modules; print('light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "light", done.stderr
