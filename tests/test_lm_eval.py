"""The LM Evaluation Harness in memory: shots of each task, standard errors and versions, all offline."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from data.base import DataBundle
from evals.base import Subject
from evals.lm_eval import INSTALL, LmEval, measurements, unit_of
from main import run
from models.llama import Llama, llama
from prune.base import Plan
from prune.surgery import cut
from tests.adapters import bundle_of, toy_on_tokens
from tests.conftest import Compose
from tests.modules import stirred
from utils.errors import InputError, RunError

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (requirements-lm_eval.txt)"
)
ROWS = [{"question": f"{word} is", "choices": [" good", " bad"], "label": i % 2} for i, word in enumerate("abcdefgh")]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/rows.jsonl, train: {folder}/rows.jsonl}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
{more}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local tasks on eight questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, more in (("letters", ""), ("never_shot", "num_fewshot: 0")):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, folder=tasks, more=more))
    return tasks


def reader() -> Llama:
    """A random model that reads bytes."""
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 160}  # fmt: skip
    model = llama(settings=sizes, tokenizer="byte")
    stirred(model.network)
    return model


def data_of() -> DataBundle:
    return bundle_of({"input_ids": torch.randint(3, 50, (6, 9))})


def right(model: Llama, shots: int) -> float | None:
    """The accuracy without the harness; what shots it draws is its own business, so without any."""
    if shots:
        return None
    read, hits = model.preprocessing.tokenizer, 0
    for row in ROWS:
        costs = []
        for choice in row["choices"]:
            context, whole = read(row["question"])["input_ids"], read(row["question"] + choice)["input_ids"]
            with torch.inference_mode():
                logs = model.logits({"input_ids": torch.tensor([whole])})[0].log_softmax(-1)
            costs.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        hits += costs.index(max(costs)) == row["label"]
    return hits / len(ROWS)


@needs_lm_eval
def test_figures_are_those_of_a_plain_loop_dense_and_cut(folder: Path) -> None:
    model, data = reader(), data_of()
    kept = {g.name: torch.arange(0, g.count, 2) for g in model.unit_groups()}
    pruned = cut(model, Plan.of(model, kept))
    metric = LmEval(tasks={"letters": 0}, include=str(folder))
    metric.check(model, data)
    pad = model.preprocessing.tokenizer.pad_token
    found = metric.measure([Subject(model, data), Subject(pruned, data)])
    for subject, figures in zip((model, pruned), found, strict=True):
        figure = figures["lm_eval_letters_acc"]
        assert figure.value == pytest.approx(right(subject, 0)) and figure.unit == "fraction"
        p = figure.value
        assert p is not None
        assert figure.details["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 7), abs=1e-9)
        assert (figure.details["version"], figure.details["shots"], figure.details["samples"]) == (3.0, 0, 8)
        assert figure.details["lm_eval"]
    assert model.preprocessing.tokenizer.pad_token == pad, "the model's own tokenizer stays as it was"


@needs_lm_eval
def test_shots_are_each_tasks_own(folder: Path) -> None:
    subject = Subject(reader(), data_of())
    one = LmEval(tasks={"letters": 2, "never_shot": 0}, include=str(folder)).measure([subject])[0]
    other = LmEval(tasks={"letters": None, "never_shot": None}, include=str(folder)).measure([subject])[0]
    shots = lambda found: [found[f"lm_eval_{name}_acc"].details["shots"] for name in ("letters", "never_shot")]  # noqa: E731
    assert shots(one) == [2, 0] and shots(other) == [0, 0]
    with pytest.raises(RunError, match="lm_eval used other shots"):
        LmEval(tasks={"never_shot": 3}, include=str(folder)).measure([subject])


@needs_lm_eval
def test_limits_and_models_without_text(folder: Path) -> None:
    subject = Subject(reader(), data_of())
    few = LmEval(tasks={"letters": 0}, include=str(folder), limit=3).measure([subject])[0]
    assert few["lm_eval_letters_acc"].details["samples"] == 3
    toy, samples = toy_on_tokens()
    none = LmEval(tasks={"letters": 0}, include=str(folder)).measure([Subject(toy, bundle_of(samples))])[0]
    assert none["lm_eval_letters"].value is None and "no causal" in str(none["lm_eval_letters"].reason)


@needs_lm_eval
def test_mistakes_are_found_before_work(folder: Path) -> None:
    model, data = reader(), data_of()
    with pytest.raises(InputError, match="'lettrs' is unknown; did you mean 'letters'"):
        LmEval(tasks={"lettrs": 0}, include=str(folder)).check(model, data)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="'letters' cannot be loaded"):
        LmEval(tasks={"letters": 0}, include=str(folder)).check(model, data)
    for tasks in ({}, {"letters": -1}, {"letters": "five"}, {"letters": True}):
        with pytest.raises(InputError, match="evals.lm_eval.tasks"):
            LmEval(tasks=tasks)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        LmEval(tasks={"hellaswag": 0})
    assert str(error.value) == INSTALL and "pip install" in INSTALL and "\n" not in INSTALL


def test_a_groups_and_filters_rows() -> None:
    """What the harness returns, by hand: a filter enters the name, texts and errors are no figures of their own."""
    row = {"alias": "x", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "acc,none": 0.5,
           "acc_stderr,none": "N/A", "sample_len": 8}  # fmt: skip
    results = {"results": {"t": row}, "versions": {"t": 2}, "n-shot": {"t": 5}, "n-samples": {"t": {"effective": 8}}}
    found = measurements("t", results, {})
    assert set(found) == {"lm_eval_t_exact_match_strict", "lm_eval_t_acc"}
    assert found["lm_eval_t_exact_match_strict"].details["standard_error"] == 0.1
    assert found["lm_eval_t_acc"].details["standard_error"] is None
    assert unit_of("word_perplexity") == "per word" and unit_of("acc_norm") == "fraction" and unit_of("bleu") == "bleu"


@needs_lm_eval
def test_a_run_reports_it(folder: Path, composed: Compose, tmp_path: Path) -> None:
    sizes = (
        "model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, max_position_embeddings: 160}"
    )
    small = ("data.length=32", "data.calibration_length=16", "data.calibration_samples=8", "data.train_samples=32",
             "data.validation_samples=4", "model.training.epochs=1", f"storage={tmp_path}/s")  # fmt: skip
    tasks = ("evals=[lm_eval]", "evals.lm_eval.tasks={letters: 1}", f"evals.lm_eval.include={folder}")
    record = run(composed("+experiment=tiny_llama_wanda", sizes, *small, *tasks), tmp_path / "out")
    assert record.pruned["lm_eval_letters_acc"].details["shots"] == 1
    assert "lm_eval_letters_acc" in (tmp_path / "out" / "report.md").read_text()
