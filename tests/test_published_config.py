"""The authors' configuration files in our terms: each key goes to its own setting, and no mistake passes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune.optin.published_config import NO_EFFECT, Published, expanded, from_published, overrides
from utils.compose import CommandLine, command_line_problems
from utils.errors import InputError

ROOT = Path(__file__).parent.parent

LANGUAGE = """
task_name: "language"
dataset: "mnli"
model_name: "bert-base-uncased"
batch_size: 128
timer_batch_size: 32
loss_type: "MMD+KL"
lambda_contribution: 10
mac_constraint: 0.6
seed: 0
fine_tune: False
logging: False
embedding_choice: 'layernorm_before'
temp: 4
aggregate: 'sum'
head_include_fin_layer_mmd: True
neuron_include_fin_layer_mmd: True
head_fin_decay_bool: True
head_fin_decay_val: 0.5
neuron_fin_decay_bool: True
neuron_fin_decay_val: 0.5
head_metric_decay: 0.5
neuron_metric_decay: 1
distill_token: False
"""
VISION = """
task_name: vision
dataset: ImageNet
model_name: deit-small-patch16-224
batch_size: 32
val_batch_size: 1024
loss_type: MMD+KL
lambda_contribution: 100
mac_constraint: 0.684
seed: 57
fine_tune: False
logging: False
embedding_choice: layernorm_before
temp: 4
aggregate: sum
beta_config_only: False
head_include_fin_layer_mmd: True
neuron_include_fin_layer_mmd: True
head_fin_decay_bool: False
head_fin_decay_val: 1
neuron_fin_decay_bool: True
neuron_fin_decay_val: 1e-4
head_metric_decay: 1
neuron_metric_decay: 1
patch_metric_decay: 1
distill_token: True
max_patch_evnvelope: 100
"""


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def published(folder: Path, text: str, **changes: Any) -> Published:
    """Read a configuration with some keys changed; None takes a key away."""
    lines = [line for line in text.splitlines() if line.partition(":")[0] not in changes]
    lines += [f"{key}: {value}" for key, value in changes.items() if value is not None]
    return from_published(written(folder / "published.yaml", "\n".join(lines).encode()))


def test_the_language_column(tmp_path: Path) -> None:
    found = published(tmp_path, LANGUAGE)
    assert found.settings == {
        "model": "bert", "model.name": "bert-base-uncased", "data": "glue", "data.task": "mnli", "prune": "optin",
        "data.calibration_batches": 1, "data.calibration_batch_size": 128, "data.batch_size": 32, "seed": 0,
        "prune.mode": "compat", "prune.ratio": 0.4, "prune.loss": "md+kd", "prune.lambda_c": 0.1,
        "prune.temperature": 4, "prune.aggregate": "sum", "prune.head_final": True, "prune.neuron_final": True,
        "prune.head_decay": 0.5, "prune.neuron_decay": 1, "prune.last_head_decay": 0.5,
        "prune.last_neuron_decay": 0.5,
    }  # fmt: skip
    assert found.ignored.keys() == {*NO_EFFECT, "fine_tune"}


def test_the_vision_column(tmp_path: Path) -> None:
    found = published(tmp_path, VISION)
    assert found.settings == {
        "model": "vit", "model.name": "deit_small_patch16_224", "data": "imagenet", "prune": "optin_tau",
        "recover": "none", "data.calibration_batches": 1, "data.calibration_batch_size": 32,
        "data.batch_size": 1024, "seed": 57, "prune.mode": "compat", "prune.ratio": 0.316, "prune.loss": "md+kd",
        "prune.lambda_c": 0.01, "prune.temperature": 4, "prune.aggregate": "sum", "prune.head_final": True,
        "prune.neuron_final": True, "prune.head_decay": 1, "prune.neuron_decay": 1, "prune.token_decay": 1,
        "prune.token_envelope": 100, "prune.last_head_decay": 1, "prune.last_neuron_decay": 0.0001,
    }  # fmt: skip
    assert found.ignored == {**NO_EFFECT, "head_fin_decay_val": "head_fin_decay_bool is false"}


def test_each_value_goes_to_its_own_setting(tmp_path: Path) -> None:
    changes = {
        "dataset": "SST-2", "model_name": "someone/BERT_2.0", "batch_size": 7, "timer_batch_size": 9, "temp": 1.5,
        "loss_type": "MMD", "lambda_contribution": 4, "mac_constraint": 0.89, "seed": 3, "aggregate": "mean",
        "head_include_fin_layer_mmd": False, "head_fin_decay_val": 0.25, "neuron_fin_decay_val": 0.125,
        "head_metric_decay": 0.75, "neuron_metric_decay": 2,
    }  # fmt: skip
    wanted = {
        "data.task": "sst2", "model.name": "someone/BERT_2.0", "data.calibration_batch_size": 7,
        "data.batch_size": 9, "prune.temperature": 1.5, "prune.loss": "md", "prune.lambda_c": 0.25,
        "prune.ratio": 0.11, "seed": 3, "prune.aggregate": "mean", "prune.head_final": False,
        "prune.last_head_decay": 0.25, "prune.last_neuron_decay": 0.125, "prune.head_decay": 0.75,
        "prune.neuron_decay": 2,
    }  # fmt: skip
    settings = published(tmp_path, LANGUAGE, **changes).settings
    assert {key: settings[key] for key in wanted} == wanted
    assert published(tmp_path, LANGUAGE, loss_type="KL").settings["prune.loss"] == "kd"
    beta = published(tmp_path, VISION, beta_config_only=True, fine_tune=True, neuron_fin_decay_bool=False).settings
    assert (beta["prune"], beta["recover"], beta["prune.last_neuron_decay"]) == ("optin", "finetune", 1)


def test_what_is_ignored_is_named(tmp_path: Path) -> None:
    found = published(tmp_path, LANGUAGE, beta_config_only=True, wandb="x", max_patch_evnvelope="odd", logging=None)
    assert found.ignored["wandb"] == "not a key of the published configuration"
    assert found.ignored["beta_config_only"] == "it has an effect with task_name=vision alone"
    assert f"{found.path}: wandb is ignored: not a key of the published configuration" in found.notes
    assert "max_patch_evnvelope" in found.ignored and "logging" not in found.ignored
    assert not {"prune.token_envelope", "prune.token_decay"} & found.settings.keys()


@pytest.mark.parametrize("text", [LANGUAGE, VISION])
def test_no_key_with_an_effect_may_be_missing(text: str, tmp_path: Path) -> None:
    names = [line.partition(":")[0] for line in text.split("\n") if line]
    whole = published(tmp_path, text)
    for name in names:
        if name in whole.ignored:
            assert published(tmp_path, text, **{name: None}).settings == whole.settings
            continue
        with pytest.raises(InputError, match=rf"published.yaml: {name}: no value given"):
            published(tmp_path, text, **{name: None})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"mac_constraint": 1.5}, "mac_constraint=1.5: must be in (0, 1]"),
        ({"mac_constraint": 0}, "mac_constraint=0: must be in (0, 1]"),
        ({"mac_constraint": "'0.6'"}, "mac_constraint=0.6: must be a finite number"),
        ({"mac_constraint": ".nan"}, "mac_constraint=nan: must be a finite number"),
        ({"mac_constraint": "${oc.env:HOME}"}, "mac_constraint=${oc.env:HOME}: must be a finite number"),
        ({"lambda_contribution": 0}, "lambda_contribution=0: must be above 0"),
        ({"loss_type": "MD"}, "loss_type=MD: must be one of MMD+KL, MMD, KL"),
        ({"aggregate": "max"}, "aggregate=max: must be one of sum, mean"),
        ({"batch_size": True}, "batch_size=true: must be a whole number"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"timer_batch_size": 1.5}, "timer_batch_size=1.5: must be a whole number"),
        ({"seed": -1}, "seed=-1: must be in [0, 4294967295]"),
        ({"temp": "null"}, "temp=null: must be a finite number"),
        ({"head_fin_decay_bool": "1"}, "head_fin_decay_bool=1: must be true or false"),
        ({"head_metric_decay": -1}, "head_metric_decay=-1: must be at least 0"),
        ({"task_name": "fusion"}, "task_name=fusion: must be one of language, vision"),
        ({"dataset": 3}, "dataset=3: must be text"),
        ({"model_name": "'a b'"}, "model_name=a b: must be a name of letters"),
        ({"model_name": "'${seed}'"}, "model_name=${seed}: must be a name of letters"),
        ({"model_name": "x/"}, "model_name=x/: must be a name of letters"),
    ],
)
def test_wrong_values_are_named_with_their_rule(changes: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        published(tmp_path, LANGUAGE, **changes)
    assert str(caught.value).startswith(f"prune.published={tmp_path / 'published.yaml'}: ")
    assert rule in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        published(tmp_path, VISION, temp="hot", seed=None, batch_size=0, patch_metric_decay="x")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "batch_size=0", "seed", "temp=hot", "patch_metric_decay=x",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"a: [", b"\xff\xfe\x00", b"5", b"a: 1\na: 2\n"])
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "x.yaml", content)
    with pytest.raises(InputError, match="x.yaml: must "):
        from_published(path)
    with pytest.raises(InputError, match="must be an existing file"):
        from_published(tmp_path)


@pytest.mark.parametrize("text", [LANGUAGE, VISION])
def test_model_and_data_of_the_overrides_compose(text: str, tmp_path: Path) -> None:
    lines = overrides(published(tmp_path, text))
    assert len(lines) == len(published(tmp_path, text).settings)
    assert command_line_problems(CommandLine(ROOT / "configs", overrides=[o for o in lines if o[:5] != "prune"])) == []


def test_text_that_hydra_would_read_as_something_else_is_quoted(tmp_path: Path) -> None:
    lines = overrides(published(tmp_path, LANGUAGE, model_name="'123'", head_include_fin_layer_mmd=False))
    assert "model.name='123'" in lines and "prune.head_final=false" in lines and "prune.temperature=4.0" in lines
    assert "model.name='null'" in overrides(published(tmp_path, LANGUAGE, model_name="'null'"))


def test_what_is_typed_wins(tmp_path: Path) -> None:
    found = published(tmp_path, LANGUAGE)
    keys = {line.partition("=")[0] for line in overrides(found)}

    def left_out(*given: str) -> set[str]:
        return keys - {line.partition("=")[0] for line in overrides(found, given)}

    assert left_out("evals=[accuracy]", "model=bert", "data=glue") == {"model", "data"}
    assert left_out("prune.ratio=0.2,0.3", "+seed=1") == {"prune.ratio", "seed"}
    assert left_out("model=bert_base") == {"model", "model.name"}
    assert left_out("data=squad") == {key for key in keys if key.startswith("data")}


def test_a_command_line_is_expanded_once(tmp_path: Path) -> None:
    path = published(tmp_path, LANGUAGE).path
    asked = ["-m", f"prune.published={path}", "prune.ratio=0.2,0.3", "data.root=x"]
    arguments = expanded(asked)
    assert arguments == ["-m", *overrides(from_published(path), asked), *asked[1:]]
    assert arguments.count("model=bert") == 1 and "prune.ratio=0.4" not in arguments
    assert expanded(arguments) == arguments
    for nothing in ([], ["prune=fisher", "--cfg", "job"], ["prune.published=null"]):
        assert expanded(nothing) == nothing
    with pytest.raises(InputError, match="must be given once, is 2 times"):
        expanded([asked[1], asked[1]])
    with pytest.raises(InputError, match="prune.published=/nowhere.yaml: must be an existing file"):
        expanded(["+prune.published='/nowhere.yaml'"])


def test_configurations_are_read_without_torch() -> None:
    code = "import sys, prune.optin.published_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
