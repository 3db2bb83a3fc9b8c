"""Accuracies in pairs: exact figures from a slow loop, files that a run leaves, and runs that must not be compared."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from evals.accuracy import Accuracy
from evals.base import Subject
from evals.each_sample import ENDING, TENSOR
from evals.paired import against, main
from evals.quality import Quality
from evals.side_files import file_name
from tests.adapters import bundle_of, causal, toy_on_tokens


def test_differences_and_errors_are_those_of_a_slow_loop() -> None:
    draw = np.random.default_rng(0)
    right, reference = (draw.integers(0, 2, (seeds, 40)).astype(float) for seeds in (3, 2))
    each = [
        statistics.fmean(right[s][n] for s in range(3)) - statistics.fmean(reference[s][n] for s in range(2))
        for n in range(40)
    ]
    found = against(right, reference)
    assert found.difference == pytest.approx(statistics.fmean(each))
    assert found.paired == pytest.approx(statistics.stdev(each) / math.sqrt(40))
    assert found.over_seeds == pytest.approx(statistics.stdev(statistics.fmean(s) for s in right) / math.sqrt(3))
    assert found.accuracy == pytest.approx(right.mean())
    assert against(right[:1], reference).over_seeds is None
    same = against(right, right)
    assert same.difference == 0 and same.paired == 0, "the same answers differ by nothing, without any error"


@pytest.mark.parametrize("shapes", [((2, 5), (2, 6)), ((5,), (5,)), ((2, 1), (2, 1))])
def test_other_samples_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must be"):
        against(*(np.ones(shape) for shape in shapes))


def test_a_run_leaves_which_samples_are_right() -> None:
    model, samples = toy_on_tokens()
    subject = Subject(model, bundle_of(samples))
    for metric in (Accuracy(), Quality()):
        figure = metric.measure([subject])[0]["accuracy"]
        right = load(figure.files[ENDING])[TENSOR]
        wanted = torch.cat([logits.argmax(dim=-1) == batch["labels"] for logits, batch in subject.predictions])
        assert right.dtype == torch.uint8 and torch.equal(right.bool(), wanted)
        assert float(right.double().mean()) == pytest.approx(float(figure.value or 0))
    words, texts = causal("llama")
    for figure in Quality().measure([Subject(words, bundle_of(texts))])[0].values():
        assert not figure.files, "a text is not right or wrong"


def run_folder(folder: Path, right: list[int] | None, validation: str = "v", ratio: float = 0.3) -> Path:
    folder.mkdir(parents=True)
    keys = ("config", "config_hash", "environment", "fingerprints", "dense", "pruned", "versions", "device")
    content = {
        **{key: {} for key in keys}, "fingerprints": {"data": "d"}, "status": "ok", "method": "obs",
        "data": {"fingerprints": {"validation": validation}},
        "command": f"python main.py prune=obs 'prune.repair=[refit]' prune.ratio={ratio}",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(content))
    if right is not None:
        from safetensors.torch import save_file

        save_file({TENSOR: torch.tensor(right, dtype=torch.uint8)}, folder / file_name("pruned", "accuracy", ENDING))
    return folder


def test_the_command_prints_a_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job, right in enumerate(([1, 1, 1, 0], [1, 1, 0, 0])):
        run_folder(tmp_path / "sweep" / str(job), right)
    other = run_folder(tmp_path / "other", [1, 0, 0, 0], ratio=0.5)
    assert main([str(tmp_path / "sweep"), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| obs, prune.ratio=0.3, prune.repair=[refit] | 2 | 62.50 (12.50) |  |"
    assert lines[3].startswith("| obs, prune.ratio=0.5, prune.repair=[refit] | 1 | 25.00 | -37.50 ± ")


def test_runs_that_are_no_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_folder(tmp_path / "a", [1, 0])
    assert main([str(first), str(run_folder(tmp_path / "b", [1, 0], validation="w"))]) == 2
    assert "other samples" in capsys.readouterr().err
    assert main([str(first), str(run_folder(tmp_path / "c", None))]) == 2
    assert "evals=[accuracy]" in capsys.readouterr().err
    assert main([str(first), str(tmp_path / "nowhere")]) == 2
