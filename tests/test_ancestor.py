"""The ancestor's published figures, the golden integers beside them, and what its set-up got wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tokens import ancestor, dense, one_by_one, packed, padded
from data.random_labels import random_labels
from data.signal_tokens import signal_tokens
from evals.ancestor_counts import AncestorCounts
from evals.base import Subject
from main import run
from models.ancestor_encoder import AncestorEncoder, AncestorNetwork, ancestor_encoder, dropped_as_published
from models.batch_cost import EncoderShape, executed, padding_waste
from models.token_cost import TokenCosts, token_costs
from models.toy_encoder import toy_encoder
from models.vit import vit
from prune.base import Plan
from prune.tokens.ancestor import AncestorThreshold
from prune.tokens.dynamicvit import dynamicvit_macs, stage_tokens
from tests.conftest import Compose
from utils.errors import InputError

KEPT = [79, 88, 85, 73, 83, 83, 81, 76, 71, 79, 73, 71, 77, 80, 76, 70]
SHAPE = EncoderShape(512, 2048, 2, 2)
SMALL_SIZES = ("model.width=32", "model.heads=2", "model.neurons=24", "data.token_width=32")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def deit_small_costs() -> TokenCosts:
    return token_costs(vit(name="deit_small_patch16_224"), {"inputs": torch.zeros(1, 3, 224, 224)})


def seeded() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(16, 128, 512)


def test_the_seeded_batch_keeps_what_is_published() -> None:
    x = seeded()
    counts = (x.norm(dim=-1) > 13.0).sum(1).tolist()
    assert counts == KEPT and sum(counts) == 1245 and max(counts) == 88
    assert sum(n * n for n in counts) == 97_311
    second = (torch.rand(16, 128, 512) * 1.02).norm(dim=-1) > 13.0
    assert int(second.sum()) == 1836 and int(second.sum(1).max()) == 121


def test_the_data_begins_with_the_seeded_batch() -> None:
    data = random_labels(train_samples=16, validation_samples=32)
    first = next(iter(data.validation))
    assert torch.equal(first["inputs"], seeded()) and set(first["labels"].tolist()) == {0, 1}
    assert any("random" in note for note in data.notes)


@pytest.mark.parametrize(
    ("batching", "linear", "second", "layers", "products", "head", "total"),
    [
        ("mask", 536_870_912, 536_870_912, 12_884_901_888, 536_870_912, 2_097_152, 13_423_869_952),
        ("pad", 369_098_752, 507_510_784, 8_858_370_048, 253_755_392, 1_441_792, 9_113_567_232),
        ("pack", 326_369_280, 481_296_384, 7_832_862_720, 199_292_928, 1_274_880, 8_033_430_528),
    ],
)
def test_golden_macs_of_a_batch(
    batching, linear: int, second: int, layers: int, products: int, head: int, total: int
) -> None:
    tokens, pairs = executed(KEPT, 128, batching)
    assert tokens * 512 * 512 == linear
    assert tokens * SHAPE.per_token == layers and pairs * SHAPE.per_pair == products
    assert tokens * 512 * 2 == head and SHAPE.macs(tokens, pairs) == total
    others = [115] * 15 + [111]  # any counts with the second draw's sum and its longest
    others[0], others[1] = 121, 109
    assert sum(others) == 1836 and executed(others, 128, batching)[0] * 512 * 512 == second


def test_golden_figures_of_the_ancestor() -> None:
    assert [SHAPE.fvcore_flops(16 * n) for n in (128, 88)] == [12_907_970_560, 8_874_229_760]
    # as it runs: attention over the 16 samples at each position
    assert [SHAPE.macs(16 * n, n * 16 * 16) for n in (128, 88)] == [12_954_107_904, 8_905_949_184]
    assert padding_waste(KEPT) == pytest.approx(1 - 1245 / (16 * 88)) and padding_waste([0, 0]) == 0


def test_the_published_figures_come_out_of_a_run(one_thread: None) -> None:
    data = random_labels(train_samples=16, validation_samples=16)
    model = ancestor_encoder(classes=2, token_width=512)
    assert sum(p.numel() for p in model.network.parameters()) == 6_305_794  # "6.306 M"
    pruned = AncestorThreshold().apply(model, Plan.of(model, {}, details={"threshold": 13.0}))
    whole, dropped = AncestorCounts().measure([Subject(m, data) for m in (model, pruned)])
    assert whole["fvcore_flops"].value == 12_907_970_560 and dropped["fvcore_flops"].value == 8_874_229_760
    assert whole["executed_macs"].value == 12_954_107_904 and dropped["executed_macs"].value == 8_905_949_184
    details = dropped["kept_tokens"].details
    assert details["counts"] == KEPT and details["longest"] == 88
    assert details["layers_alike"], "post-norm outputs all have one norm: deeper layers drop nothing"
    assert dropped["kept_tokens"].value == 77.8125 and whole["kept_tokens"].value == 128


def small(seed: int = 0) -> AncestorEncoder:
    torch.manual_seed(seed)
    return ancestor_encoder(classes=2, token_width=32, width=32, heads=2, neurons=24)


def test_what_was_wrong_with_it_is_still_wrong() -> None:
    model = small()
    x = torch.rand(4, 10, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = model.logits({"inputs": x})[0]
        others = model.logits({"inputs": torch.cat([x[:1], x[1:].flip(1) + 1])})[0]
        alone = model.logits({"inputs": x[:1]})[0]
    assert (together - others).abs().max() > 1e-3 and (together - alone).abs().max() > 1e-3

    right = toy_encoder(classes=2, tokens=10, token_width=32, width=32, heads=2, neurons=24)
    with torch.inference_mode():
        together, alone = right.logits({"inputs": x})[0], right.logits({"inputs": x[:1]})[0]
    assert (together - alone).abs().max() <= 1e-5


def test_dropping_pads_with_zeros_to_the_longest() -> None:
    x = torch.tensor([[[3.0], [1.0], [4.0]], [[1.0], [1.0], [5.0]]])
    alive = torch.tensor([[True, True, True], [True, True, True]])
    padded, there = dropped_as_published(x, alive, 2.0)
    assert padded.squeeze(-1).tolist() == [[3.0, 4.0], [5.0, 0.0]] and there.tolist() == [[True, True], [True, False]]
    padded, there = dropped_as_published(padded + 9, there, 2.0)
    assert there.sum(1).tolist() == [2, 1], "padding is not taken for a token, however long"


def test_the_timed_paths_give_what_each_sample_gives_alone() -> None:
    torch.manual_seed(0)
    network = AncestorNetwork(2, 32, 2, 4, 24, 0.1).eval()
    x = torch.rand(5, 12, 32)
    with torch.inference_mode():
        right = one_by_one(network, x, 3.2)
        assert (padded(network, x, 3.2) - right).abs().max() <= 1e-5
        assert (packed(network, x, 3.2) - right).abs().max() <= 1e-5
        assert (ancestor(network, x, 3.2) - right).abs().max() > 1e-3, "its padding leaks"
        assert (dense(network, x, 3.2) - right).abs().max() > 1e-3, "the threshold must bite"


@pytest.mark.parametrize(
    ("rho", "left", "backbone", "predictors"),
    [
        (0.9, [196, 176, 158, 142], 3_913_635_840, 127_098_240),
        (0.8, [196, 156, 125, 100], 3_348_665_088, 114_388_416),
        (0.7, [196, 137, 96, 67], 2_878_020_096, 102_877_632),
        (0.6, [196, 117, 70, 42], 2_472_868_608, 91_846_464),
        (0.5, [196, 98, 49, 24], 2_146_806_528, 82_254_144),
    ],
)
def test_golden_macs_of_dynamicvit(
    deit_small_costs: TokenCosts, rho: float, left: list[int], backbone: int, predictors: int
) -> None:
    assert stage_tokens(196, rho) == left
    assert dynamicvit_macs(deit_small_costs, 384, rho) == (backbone, predictors)


def test_the_answer_sits_in_the_signal_tokens() -> None:
    data = signal_tokens(train_samples=64, validation_samples=64, tokens=20, token_width=64, strength=30.0)
    batch = data.train.tensors  # type: ignore[attr-defined]
    loud = batch["inputs"].norm(dim=-1) > (64 + 15**2) ** 0.5
    assert (loud.sum(1) == 5).all(), "signal tokens are longer than the others"
    carried = batch["inputs"][loud].view(64, 5, 64)
    own = torch.stack([carried[batch["labels"] == c].mean((0, 1)) for c in range(4)])
    votes = torch.stack([(carried @ own.T).argmax(-1).eq(c).sum(1) for c in range(4)], dim=1)
    assert torch.equal(votes.argmax(1), batch["labels"]) and (votes.max(1).values == 3).all()
    quiet = batch["inputs"].masked_fill(loud[..., None], 0).sum(1)
    assert (quiet @ own.T).argmax(1).eq(batch["labels"]).float().mean() < 0.5, "nothing is in the other tokens"
    again = signal_tokens(train_samples=64, validation_samples=64, tokens=20, token_width=64, strength=30.0)
    assert again.fingerprint == data.fingerprint
    assert signal_tokens(train_samples=64, tokens=20, token_width=64, seed=1).fingerprint != data.fingerprint
    assert signal_tokens(train_samples=64, tokens=20, token_width=8, rivals=0, classes=1).task.classes == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rivals": 3}, "data.rivals=3: must be fewer than half of data.signals=5"),
        ({"tokens": 4}, "data.signals=5: must be at most data.tokens=4"),
        ({"classes": 1}, "data.classes=1: must be at least 2"),
        ({"calibration_batches": 0}, "must be between 1 and the 960 training samples"),
    ],
)
def test_data_that_makes_no_sense_is_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        signal_tokens(**{"token_width": 8, "tokens": 16, "validation_samples": 4} | given)  # type: ignore[arg-type]


def test_the_parts_of_the_ancestor_go_with_each_other_only() -> None:
    model = toy_encoder(classes=2, tokens=4, token_width=8, width=8, heads=2, neurons=8)
    data = random_labels(train_samples=16, validation_samples=16, tokens=4, token_width=8)
    with pytest.raises(InputError, match="prune=ancestor_threshold: needs model=ancestor_encoder"):
        AncestorThreshold().plan(model, None, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="evals=ancestor_counts: counts model=ancestor_encoder alone"):
        AncestorCounts().check(model, data)
    with pytest.raises(InputError, match="must be data.token_width=8, there is no embedding"):
        ancestor_encoder(classes=2, token_width=8, width=16)
    with pytest.raises(InputError, match="must be a multiple of model.heads=3"):
        ancestor_encoder(classes=2, token_width=16, width=16, heads=3)


def test_the_published_experiment_runs_small(composed: Compose, tmp_path: Path) -> None:
    few = ("data.train_samples=32", "data.validation_samples=32", "data.tokens=12", "prune.threshold=3.2")
    timed = ("evals.latency.seconds=0.05", f"storage={tmp_path}/storage")
    record = run(composed("+experiment=toy_tokens_ancestor", *SMALL_SIZES, *few, *timed), tmp_path / "out")
    assert record.status == "ok"
    kept = record.pruned["kept_tokens"]
    assert kept.value is not None and 0 < kept.value < 12
    assert record.pruned["accuracy"].details["chance"] == 0.5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "random" in report and "mistakes included" in report
