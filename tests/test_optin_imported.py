"""Published rankings and configuration files through whole runs."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from main import run
from prune.optin.published_config import expanded
from tests.conftest import Compose
from utils.errors import InputError

ROOT = Path(__file__).parent.parent
LAYERS, HEADS, NEURONS, TOKENS = 2, 2, 12, 17


def published(folder: Path, tokens: int = TOKENS) -> Path:
    """Rankings of the small toy encoder in the authors' form: later units matter less, and tokens least."""
    folder.mkdir(parents=True)
    heads = [(torch.tensor(-9.0 + i + h), i, h, "head") for i in range(LAYERS) for h in range(HEADS)]
    neurons = [(torch.tensor(-5.0 + n / 50), i, n, "neuron") for i in range(LAYERS) for n in range(NEURONS)]
    patches = [(torch.tensor(-2.0 + p / 50), i, NEURONS + p, "neuron") for i in range(LAYERS) for p in range(tokens)]
    for name, rows in (("head", heads), ("neuron", sorted([*neurons, *patches], key=lambda row: float(row[0])))):
        (folder / f"{name}_ranking_body.pkl").write_bytes(pickle.dumps(rows))
    return folder


def record_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("method", ["optin", "optin_tau"])
@pytest.mark.parametrize("mode", ["clean", "compat"])
def test_a_ranking_is_imported_and_the_record_says_so(
    method: str, mode: str, small_config: Compose, tmp_path: Path
) -> None:
    folder = published(tmp_path / "theirs")
    settings = (f"prune={method}", f"prune.mode={mode}", f"prune.rankings={folder}", "prune.ratio=0.2")
    run(small_config(*settings, "evals=[params]"), tmp_path)
    record = record_of(tmp_path)
    assert any(str(folder) in warning and "final" in warning for warning in record["warnings"])
    assert str(folder) in (tmp_path / "report.md").read_text()
    kept = {g["name"]: g for g in json.loads((tmp_path / "plan.json").read_text())["groups"]}
    for name in ("blocks.0.neurons", "blocks.1.neurons"):
        units = kept[name]["kept_units"]
        assert units == list(range(len(units)))  # the first ones, which the file calls most important


def test_the_authors_tree_is_found_by_itself_in_compat_mode(small_config: Compose, tmp_path: Path) -> None:
    tree = published(tmp_path / "storage" / "vision" / "digits" / "toy-encoder")
    settings = (f"storage={tmp_path / 'storage'}", "prune=optin", "prune.ratio=0.2", "evals=[params]")
    run(small_config(*settings, "prune.mode=compat"), tmp_path / "compat")
    assert any(str(tree) in warning for warning in record_of(tmp_path / "compat")["warnings"])
    run(small_config(*settings), tmp_path / "clean")
    assert not any(str(tree) in warning for warning in record_of(tmp_path / "clean")["warnings"])


def test_another_ranking_of_the_same_name_is_read_anew(small_config: Compose, tmp_path: Path) -> None:
    folder = published(tmp_path / "theirs")
    config = small_config("prune=optin", f"prune.rankings={folder}", "evals=[params]")
    run(config, tmp_path / "a")
    run(config, tmp_path / "b")
    rows = pickle.loads((folder / "head_ranking_body.pkl").read_bytes())
    (folder / "head_ranking_body.pkl").write_bytes(pickle.dumps([(-row[0], *row[1:]) for row in rows]))
    run(config, tmp_path / "c")
    assert [record_of(tmp_path / part)["cache"]["hit"] for part in "abc"] == [False, True, False]


def test_a_ranking_without_tokens_makes_no_schedule(small_config: Compose, tmp_path: Path) -> None:
    folder = published(tmp_path / "theirs", tokens=0)
    with pytest.raises(InputError, match="no scores of blocks.0.tokens"):
        run(small_config("prune=optin_tau", f"prune.rankings={folder}", "prune.ratio=0.1"), tmp_path)


VISION = """
task_name: vision
dataset: ImageNet
model_name: deit-small-patch16-224
batch_size: 32
val_batch_size: 64
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
neuron_fin_decay_val: 0.0001
head_metric_decay: 1
neuron_metric_decay: 1
patch_metric_decay: 1
distill_token: True
max_patch_evnvelope: 100
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "main.py", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_published_configuration_is_composed_and_overridden(tmp_path: Path, composed: Compose) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(VISION)
    config = composed(*expanded([f"prune.published={path}", "prune.ratio=0.2", "model=deit_tiny"]))
    assert config.prune["_target_"].endswith("OptinTau") and config.prune.mode == "compat"
    assert (config.prune.ratio, config.prune.lambda_c, config.prune.token_envelope) == (0.2, 0.01, 100.0)
    assert config.prune.last_neuron_decay == 1e-4 and config.model.name == "deit_tiny_patch16_224"
    shown = command(f"prune.published={path}", "--cfg", "job")
    assert shown.returncode == 0 and "deit_small_patch16_224" in shown.stdout and "ratio: 0.316" in shown.stdout


def test_a_wrong_published_configuration_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(VISION.replace("temp: 4", "temp: 0").replace("loss_type: MMD+KL", "loss_type: L2"))
    found = command(f"prune.published={path}")
    assert found.returncode == 2 and "temp=0" in found.stderr and "loss_type=L2" in found.stderr
    assert "Traceback" not in found.stderr


def test_what_is_ignored_is_named_in_the_record(small_config: Compose, tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(VISION + "colour: red\n")
    ours = ("model=toy_encoder", "data=digits", "data.calibration_batch_size=16", "recover=none")
    line = [*ours, f"prune.published={path}"]
    config = small_config(*[o for o in expanded(line) if not o.startswith("data.batch_size")])
    run(config, tmp_path / "out")
    warnings = record_of(tmp_path / "out")["warnings"]
    for key in ("colour", "embedding_choice", "logging"):
        assert any(f"{key} is ignored" in warning for warning in warnings), key
