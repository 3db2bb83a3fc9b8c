"""BERT and its kin on packed tokens give what they give on padded ones."""

from pathlib import Path

import pytest
import torch

from main import run
from models.base import Batch
from models.bert import LAYOUTS, Bert, bert
from models.checkpoint import save_model
from prune.rankers.fisher import Fisher
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.test_contract import random_plan
from tests.test_experiments import TIMED, sentences
from utils.errors import InputError
from utils.hooks import captured

NAMES = [kind.replace("-", "_") for kind in LAYOUTS if kind != "megatron-bert"]
HEADS = ["bert_regression", "bert_question_answering", "distilbert_question_answering"]


def pair(name: str) -> tuple[Bert, Bert, Batch]:
    """A padded model, its packed twin, and a batch of unequal lengths."""
    model, samples = ADAPTERS[name]()
    assert isinstance(model, Bert)
    twin = model.copy()
    twin.run_packed()
    return model, twin, samples


def answers(model: Bert, samples: Batch) -> torch.Tensor:
    """Logits; those of padding, which no task reads, as zero."""
    with torch.inference_mode():
        found = model.logits(model.place(samples))
    if found.ndim == 3:
        found = found * samples["attention_mask"][..., None]
    return found


def executed(model: Bert, samples: Batch) -> list[int]:
    """Tokens that each feed-forward reader really gets."""
    seen: list[int] = []
    for point in model.feature_points():
        linear = model.network.get_submodule(point)
        stock = type(linear).forward

        def counted(x: torch.Tensor, module: torch.nn.Module = linear, forward=stock) -> torch.Tensor:
            seen.append(x[..., 0].numel())
            return forward(module, x)

        # not by a hook: a watched network runs padded
        linear.__class__ = type("Counted", (type(linear),), {"forward": lambda self, x, c=counted: c(x)})
    answers(model, samples)
    return seen


@pytest.mark.parametrize("name", [*NAMES, *HEADS])
def test_packed_is_padded(name: str) -> None:
    padded, packed, samples = pair(name)
    expected = answers(padded, samples)
    assert (answers(packed, samples) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    for row in range(2):
        one = {key: tensor[row : row + 1] for key, tensor in samples.items()}
        assert (answers(packed, one) - expected[row : row + 1]).abs().max() <= 1e-5 * max(
            1.0, float(expected.abs().max())
        )
    blind = answers(padded, {**samples, "attention_mask": torch.ones_like(samples["attention_mask"])})
    assert (blind - expected).abs().max() > 1e-3, "the mask must matter"


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta_prelayernorm"])
def test_padding_is_not_computed(name: str) -> None:
    padded, packed, samples = pair(name)
    assert executed(padded, samples) == [samples["input_ids"].numel()] * 2
    assert executed(packed, samples) == [int(samples["attention_mask"].sum())] * 2


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_units_gates_cuts_and_scores_stay_what_they_are(name: str) -> None:
    padded, packed, samples = pair(name)
    assert packed.fingerprint() == padded.fingerprint()
    assert [g.name for g in packed.unit_groups()] == [g.name for g in padded.unit_groups()]
    plan = random_plan(padded, 0)
    with masked(padded, plan):
        expected = answers(padded, samples)
    with masked(packed, plan):
        assert torch.equal(answers(packed, samples), expected), "a watched network runs padded"
    small = cut(packed, plan)
    assert small.packed and (answers(small, samples) - expected).abs().max() <= 1e-5
    assert executed(small.copy(), samples) == [int(samples["attention_mask"].sum())] * 2
    data = bundle_of(samples)
    mine, theirs = (Fisher().rank(model, data).only() for model in (packed, padded))
    assert all(torch.equal(mine[group], theirs[group]) for group in theirs)
    with captured(packed.network, packed.feature_points()) as seen:
        answers(packed, samples)
    assert all(t.shape[:2] == samples["input_ids"].shape for t in seen.values())


def test_layers_without_heads_run_packed_as_well() -> None:
    padded, _, samples = pair("bert")
    heads = {g.name: torch.tensor([], dtype=torch.int64) for g in padded.unit_groups() if g.kind == "head"}
    plan = random_plan(padded, 0).of(padded, heads)
    small = cut(padded, plan)
    expected = answers(small, samples)
    small.run_packed()
    assert (answers(small, samples) - expected).abs().max() <= 1e-5


def test_gradients_are_the_same() -> None:
    padded, packed, samples = pair("bert")
    found = []
    for model in (padded, packed):
        model.logits(model.place(samples)).square().sum().backward()
        found.append({name: p.grad for name, p in model.network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    scale = max(float(g.abs().max()) for g in found[0].values())
    assert all((found[1][name] - grad).abs().max() <= 1e-5 * scale for name, grad in found[0].items())


def test_a_batch_without_a_mask_or_with_an_empty_sample_runs() -> None:
    padded, packed, samples = pair("bert")
    bare = {"input_ids": samples["input_ids"]}
    assert torch.equal(answers(packed, bare), answers(padded, bare))
    mask = samples["attention_mask"].clone()
    expected = answers(packed, samples)
    mask[1] = 0
    found = answers(packed, {**samples, "attention_mask": mask})
    others = torch.tensor([0, 2, 3, 4, 5])
    assert found.isfinite().all() and (found[others] - expected[others]).abs().max() <= 1e-5


def test_a_family_with_an_attention_of_its_own_is_refused() -> None:
    model, _ = ADAPTERS["megatron_bert"]()
    assert isinstance(model, Bert)
    with pytest.raises(InputError, match="model.packed=true: MegatronBertSelfAttention computes attention by itself"):
        model.run_packed()


def test_saved_and_loaded_packed(tmp_path: Path) -> None:
    _, packed, samples = pair("bert")
    expected = answers(packed, samples)
    folder = save_model(packed, tmp_path / "model")
    again = bert(checkpoint=str(folder), packed=True)
    assert again.packed and torch.equal(answers(again, samples), expected)
    assert not bert(checkpoint=str(folder)).packed


def test_a_whole_run_on_packed_text(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    given = (
        "model=bert",
        "data=glue",
        *sentences(tmp_path / "data"),
        "data.calibration_batches=2",
        "prune.ratio=0.2",
        *TIMED,
    )
    record = run(composed(*given, "model.packed=true", f"storage={tmp_path}/storage"), tmp_path / "out")
    assert record.status == "ok" and record.pruned["accuracy"].value is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_a_gpu_is_never_waited_for() -> None:
    _, packed, samples = pair("bert")
    expected = answers(packed, samples)
    packed.network.cuda()
    placed = packed.place(samples)
    with torch.inference_mode():
        packed.logits(placed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = packed.logits(placed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)
