"""Blocks one after the other: what statistics see, what a run leaves and takes up again, what it refuses."""

import copy
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.base import DataBundle
from evals.base import Subject
from evals.nonzero_params import NonzeroParams
from main import run
from models.base import PrunableModel, Recipe
from prune.base import Plan
from prune.recovery.base import TrainedRecovery
from prune.recovery.distill import Distill
from prune.recovery.finetune import Finetune
from prune.recovery.zeros import zeros_kept
from prune.weights.magnitude import WeightMagnitude
from prune.weights.masks import Share
from prune.weights.matrices import Solved, prunable_matrices
from prune.weights.method import WeightSparsity
from prune.weights.sparsegpt import SparseGPT
from prune.weights.statistics import Statistic, tokens_of
from prune.weights.wanda import Wanda
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose
from tests.sparse import Causal, applied_to, linear, masks_of, rebatched, same, tiny_llama, weights
from utils.errors import InputError, RunError
from utils.hooks import hooked, is_hooked
from utils.storage import Store

MODELS = {
    "llama": tiny_llama,
    **{
        name: lambda name=name: (ADAPTERS[name]()[0], bundle_of(ADAPTERS[name]()[1]))
        for name in ("toy_images", "toy_tokens", "deit", "vit_swiglu", "bert", "distilbert", "roberta")
    },
}
METHODS = {
    "magnitude": WeightMagnitude(),
    "wanda": Wanda(),
    "wanda 2:4": Wanda(pattern="2:4"),
    "wanda true_sequential": Wanda(schedule="true_sequential"),
    "wanda one_forward": Wanda(schedule="one_forward"),
    "wanda dense": Wanda(schedule="dense"),
    "wanda bfloat16": Wanda(precision="bfloat16"),
    "wanda owl": Wanda(allocation="owl", owl_multiple=1.5),
    "sparsegpt": SparseGPT(),
    "sparsegpt dense": SparseGPT(schedule="dense", allocation="global"),
}


def norms_in(model: PrunableModel, data: DataBundle, names: Sequence[str]) -> dict[str, Tensor]:
    """Root mean squares of what linears read in a model, by hooks and nothing else."""
    squares: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str, batch: dict[str, Tensor]):
        return lambda module, args: squares[name].append(tokens_of(args[0], batch).square())

    for batch in data.calibration:
        with torch.no_grad(), hooked(before=[(linear(model, name), hook(name, batch)) for name in names]):
            model.logits(batch)
    return {name: torch.cat(found).mean(dim=0).sqrt() for name, found in squares.items()}


@dataclass(frozen=True, kw_only=True)
class Spying(Wanda):
    """Wanda that keeps the norms it was given, in order."""

    seen: tuple[list[Tensor], ...] = ()

    def ranking_settings(self) -> dict[str, object]:
        return {"schedule": self.schedule}

    def solve(self, weights: Sequence[Tensor], statistic: Statistic | None, shares: Sequence[Share]) -> list[Solved]:
        assert statistic is not None
        self.seen[0].extend([statistic.norms()] * len(weights))
        return super().solve(weights, statistic, shares)


@pytest.mark.parametrize("schedule", ["block_sequential", "true_sequential", "one_forward", "dense"])
@pytest.mark.parametrize("name", list(MODELS))
def test_statistics_are_those_of_the_model_that_the_schedule_names(name: str, schedule: str, tmp_path: Path) -> None:
    """Whatever masks, rotary tables and shapes a block is given, its linears read what they read in a whole model."""
    model, data = MODELS[name]()
    spy = Spying(schedule=schedule, seen=([],))  # type: ignore[arg-type]
    done = applied_to(spy, model, data, tmp_path)
    digests = {n: facts["statistic"] for n, facts in done.plan.details["matrices"].items()}
    found = dict(zip(digests, spy.seen[0], strict=True))
    dense, pruned = (norms_in(m, data, list(found)) for m in (model, done.model))
    if schedule == "dense":
        wanted = dense
    elif schedule in ("true_sequential", "one_forward"):
        wanted = pruned
    else:  # the first linears of a block read what the blocks before give, and nothing of their own block
        first = {block: next(n for n in found if n.startswith(f"{block}.")) for block in model.blocks()}
        found = {n: norms for n, norms in found.items() if n in first.values()}
        wanted = pruned
    for linear_name, norms in found.items():
        torch.testing.assert_close(norms, wanted[linear_name], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(dense[n], pruned[n], rtol=1e-2) for n in dense)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", ["llama", "bert", "deit"])
def test_the_dense_model_stays_as_it_was(name: str, method: WeightSparsity, tmp_path: Path) -> None:
    model, data = MODELS[name]()
    before = weights(model)
    done = applied_to(method, model, data, tmp_path)
    assert same(weights(model), before) and not is_hooked(model.network) and not is_hooked(done.model.network)
    assert all(p.requires_grad for m in (model, done.model) for p in m.network.parameters())
    outside = set(before) - {f"{matrix.name}.weight" for matrix in done.plan.matrices}
    assert outside and all(torch.equal(weights(done.model)[n], before[n]) for n in outside), "only linears of blocks"
    again = applied_to(method, model, data, tmp_path)
    assert again.hit and not done.hit and same(weights(again.model), weights(done.model)) and again.plan == done.plan
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def threads_end() -> Iterator[None]:
    """Every thread that a test starts has ended with it; others of the process may live on."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("threads_end")
@pytest.mark.parametrize("method", [Wanda(ratio=0.6), SparseGPT(block_size=8)], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "bert", "deit"])
def test_one_forward_equals_true_sequential(name: str, method: WeightSparsity, tmp_path: Path) -> None:
    model, data = MODELS[name]()
    staged, again = (
        applied_to(replace(method, schedule=s), model, data, tmp_path) for s in ("one_forward", "true_sequential")
    )
    assert same(weights(staged.model), weights(again.model)) and staged.fingerprint != again.fingerprint


@pytest.mark.usefixtures("threads_end")
def test_an_error_in_the_middle_of_a_stage_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_llama()

    def fail(self, given, statistic, shares):
        raise ValueError("stop here")

    monkeypatch.setattr(Wanda, "solve", fail)
    with pytest.raises(ValueError, match="stop here"):
        applied_to(Wanda(schedule="one_forward"), model, data, tmp_path)
    assert not is_hooked(model.network)


def test_tied_embeddings_stay(tmp_path: Path) -> None:
    model, data = tiny_llama()
    done = applied_to(Wanda(), model, data, tmp_path)
    network = done.model.network
    assert network.lm_head.weight is network.model.embed_tokens.weight  # type: ignore[union-attr]
    assert bool((network.lm_head.weight != 0).all())  # type: ignore[union-attr]
    assert all("layers" in matrix.name for matrix in done.plan.matrices) and len(done.plan.matrices) == 21


def test_a_weight_that_is_used_elsewhere_is_refused() -> None:
    model, _ = ADAPTERS["toy_images"]()
    network = model.network
    network.get_submodule("blocks.0.fc1").weight = network.get_submodule("blocks.1.fc1").weight
    with pytest.raises(InputError, match="blocks.0.fc1.weight and blocks.1.fc1.weight are tied"):
        prunable_matrices(model)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_goes_on_and_ends_the_same(
    method: WeightSparsity, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_llama()
    through = applied_to(method, model, data, tmp_path / "through")
    solved: list[int] = []
    original = type(method).solve

    def solve(self, given, statistic, shares):
        layer = len(solved_blocks())
        if killing and layer == after:
            raise KeyboardInterrupt
        solved.append(layer)
        return original(self, given, statistic, shares)

    def solved_blocks() -> list[Path]:
        return list((tmp_path / "killed").rglob("*.block*.partial"))

    monkeypatch.setattr(type(method), "solve", solve)
    killing = True
    with pytest.raises(KeyboardInterrupt):
        applied_to(method, model, data, tmp_path / "killed")
    assert len(solved_blocks()) == after
    killing = False
    solved.clear()
    again = applied_to(method, model, data, tmp_path / "killed")
    assert min(solved) == after, "finished blocks are not solved again"
    assert same(weights(again.model), weights(through.model))
    assert again.plan == through.plan and not again.hit and not solved_blocks()


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(schedule="dense"), Wanda(allocation="owl")])
def test_offloading_changes_nothing(method: WeightSparsity, tmp_path: Path) -> None:
    model, data = tiny_llama()
    plain, offloaded = (
        applied_to(replace(method, offload=flag), model, data, tmp_path / str(flag)) for flag in (False, True)
    )
    assert same(weights(plain.model), weights(offloaded.model)) and plain.fingerprint == offloaded.fingerprint


def test_what_weights_depend_on_is_in_the_key(tmp_path: Path) -> None:
    model, data = tiny_llama()
    base = Wanda()
    others = [
        replace(base, ratio=0.4), replace(base, pattern="2:4"), replace(base, group="tensor"),
        replace(base, schedule="dense"), replace(base, skip=("*.down_proj",)), replace(base, variant="alpha"),
        replace(base, precision="bfloat16"),
    ]  # fmt: skip
    assert len({json.dumps(method.key(model, data)) for method in (base, *others)}) == 1 + len(others)
    other = rebatched(data, data.calibration[:1])
    assert base.key(model, data) != base.key(model, other)
    assert WeightMagnitude().key(model, data) == WeightMagnitude().key(model, other), "it looks at no data"


@pytest.mark.parametrize("schedule", ["block_sequential", "true_sequential"])
def test_precision_is_that_of_statistics_alone(schedule: str, tmp_path: Path) -> None:
    """Norms are float32, without the digits that bfloat16 has not; what a block begins with is exact."""
    model, data = tiny_llama()
    seen: dict[str, list[Tensor]] = {}
    for precision in ("float32", "bfloat16"):
        spy = Spying(ratio=0.0, schedule=schedule, precision=precision, seen=([],))  # type: ignore[arg-type]
        done = applied_to(spy, model, data, tmp_path / precision)
        seen[precision] = spy.seen[0]
        assert any("products in bfloat16" in note for note in done.plan.details["notes"]) == (precision != "float32")
    assert all(norms.dtype == torch.float32 for norms in seen["bfloat16"])
    for number, (exact, coarse) in enumerate(zip(seen["float32"], seen["bfloat16"], strict=True)):
        if number % 7 < 3:  # queries, keys and values: nothing was dropped, so they read what the dense model gives
            torch.testing.assert_close(exact, coarse, rtol=1e-6, atol=1e-7)
        else:
            assert torch.allclose(exact, coarse, rtol=0.05, atol=0.01) and not torch.equal(exact, coarse)


@pytest.mark.parametrize("schedule", ["one_forward", "dense"])
def test_precision_needs_a_pass_of_its_own(schedule: str) -> None:
    with pytest.raises(InputError, match=f"prune.precision=bfloat16: must be float32 with prune.schedule={schedule}"):
        Wanda(schedule=schedule, precision="bfloat16")  # type: ignore[arg-type]


def test_what_is_skipped_stays_dense(tmp_path: Path) -> None:
    model, data = tiny_llama()
    done = applied_to(Wanda(skip=("*.down_proj", "model.layers.0.*")), model, data, tmp_path)
    names = [matrix.name for matrix in done.plan.matrices]
    assert len(names) == 12 and not any("down_proj" in n or ".0." in n for n in names)
    assert bool((linear(done.model, "model.layers.1.mlp.down_proj").weight != 0).all())
    whole = applied_to(Wanda(skip=("model.layers.2.*",), schedule="dense"), model, data, tmp_path)
    assert len(whole.plan.matrices) == 14


def test_zeros_are_counted(tmp_path: Path) -> None:
    model, data = tiny_llama()
    done = applied_to(Wanda(), model, data, tmp_path)
    total = sum(p.numel() for p in model.network.parameters())
    counts = NonzeroParams().measure([Subject(model, data), Subject(done.model, data)])
    assert [found["nonzero_params"].value for found in counts] == [
        total, total - sum(matrix.zeros for matrix in done.plan.matrices)
    ]  # fmt: skip


@pytest.mark.parametrize("way", [Finetune(epochs=2), Distill(epochs=2)], ids=["finetune", "distill"])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(pattern="2:4")], ids=["wanda", "sparsegpt"])
def test_zeros_survive_recovery(method: WeightSparsity, way: TrainedRecovery, tmp_path: Path) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples)
    done = applied_to(method, model, data, tmp_path)
    recovered = way.recover(done.model, model, data, Store(tmp_path), seed=0).model
    before, after = masks_of(done.model, done.plan), masks_of(recovered, done.plan)
    assert all(bool(after[name][mask].all()) for name, mask in before.items())
    assert not same(weights(recovered), weights(done.model))
    assert bool((recovered.network.get_parameter("head.weight") != 0).all())
    free = way.recover(done.model, done.model, data, Store(tmp_path), seed=0).model
    assert not all(torch.equal(masks_of(free, done.plan)[n], mask) for n, mask in before.items()), "control"


def test_zeros_of_both_models_may_move() -> None:
    first, head = nn.Linear(3, 2), nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.zero_()  # a fresh head
    pruned = nn.Sequential(first, head, nn.LayerNorm(2))
    dense = copy.deepcopy(pruned)
    assert zeros_kept(pruned, dense) is None
    with torch.no_grad():
        first.weight[0, 1] = 0
        keep = zeros_kept(pruned, dense)
        assert keep is not None
        for parameter in pruned.parameters():
            parameter.fill_(1.0)
        keep()
    assert int(torch.count_nonzero(first.weight)) == 5 and bool((head.weight == 1).all())


RUNS = {
    "weight_magnitude": ("prune=weight_magnitude", "prune.group=global"),
    "wanda": ("prune=wanda", "prune.ratio=0.5"),
    "wanda 2:4": ("prune=wanda", "prune.pattern=2:4"),
    "sparsegpt": ("prune=sparsegpt", "prune.ratio=0.6", "prune.block_size=8"),
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS.keys())
def test_a_run_on_digits(overrides: tuple[str, ...], small_config: Compose, tmp_path: Path) -> None:
    cfg = small_config(*overrides, "evals=[accuracy,nonzero_params,params,macs]", f"storage={tmp_path / 's'}")
    found, again = (run(cfg, tmp_path / str(i)).to_json() for i in range(2))
    plan = found["plan"]
    assert plan["budget"] == "weights" and plan["ratio_reached"] == pytest.approx(plan["ratio_asked"], abs=0.06)
    zeros = sum(matrix["zeros"] for matrix in plan["matrices"])
    assert found["pruned"]["nonzero_params"]["value"] <= found["dense"]["nonzero_params"]["value"] - zeros
    assert found["pruned"]["macs"] == found["dense"]["macs"]
    assert any("compression only" in note for note in found["warnings"])
    assert not any("keeps everything" in note or "Latency" in note for note in found["warnings"])
    assert (found["cache"]["hit"], again["cache"]["hit"]) == (False, True)
    assert again["pruned"]["accuracy"] == found["pruned"]["accuracy"]
    assert Path(found["cache"]["path"]).is_file() and found["fingerprints"]["scores"]
    saved = Plan.load(tmp_path / "0" / "plan.json")
    assert [m.zeros for m in saved.matrices] == [m["zeros"] for m in plan["matrices"]]
    report = (tmp_path / "0" / "report.md").read_text()
    assert "## Zeros per matrix" in report and "| blocks.1.fc2 | 1 |" in report and "What was kept" not in report


def test_a_sparse_model_is_saved_and_pruned_further(small_config: Compose, tmp_path: Path) -> None:
    metrics = "evals=[nonzero_params,accuracy]"
    first = run(small_config("prune=wanda", metrics, "save=true"), tmp_path / "0").to_json()
    folder = f"model.checkpoint={tmp_path / '0' / 'model'}"
    again = run(small_config("prune=none", metrics, folder), tmp_path / "1").to_json()
    # the files that a figure rests on are named after the side
    without_files = [{n: {**m, "files": {}} for n, m in side.items()} for side in (again["dense"], first["pruned"])]
    assert without_files[0] == without_files[1]
    more = run(small_config("prune=wanda", "prune.ratio=0.7", metrics, folder), tmp_path / "2").to_json()
    assert more["pruned"]["nonzero_params"]["value"] < first["pruned"]["nonzero_params"]["value"]


def test_recovery_in_a_run_keeps_the_zeros(small_config: Compose, tmp_path: Path) -> None:
    cfg = small_config("prune=wanda", "recover=finetune", "recover.epochs=1", "evals=[nonzero_params]")
    found = run(cfg, tmp_path).to_json()
    zeros = sum(matrix["zeros"] for matrix in found["plan"]["matrices"])
    assert found["dense"]["nonzero_params"]["value"] - found["pruned"]["nonzero_params"]["value"] >= zeros


def test_calibration_is_needed(tmp_path: Path) -> None:
    model, data = tiny_llama()
    with pytest.raises(InputError, match="the calibration set is empty"):
        applied_to(Wanda(), model, rebatched(data, []), tmp_path)
    assert applied_to(WeightMagnitude(), model, rebatched(data, []), tmp_path).plan.ratio_reached == 0.5


def test_models_without_linears_in_their_blocks_are_refused(tmp_path: Path) -> None:
    model, samples = ADAPTERS["resnet_basic"]()
    with pytest.raises(InputError, match="model=resnet18: has no linear inside its blocks"):
        applied_to(WeightMagnitude(), model, bundle_of(samples), tmp_path)


def test_a_pattern_that_skips_nothing_is_refused(tmp_path: Path) -> None:
    model, data = tiny_llama()
    with pytest.raises(InputError, match=r"prune.skip: '\*.fc9' matches no linear; the model has model.layers.0"):
        applied_to(Wanda(skip=("*.fc9",)), model, data, tmp_path)


class Odd(nn.Module):
    """A block that runs one of its linears twice, and another by its weight alone."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.first(x) + self.second(x) if self.twice else nn.functional.linear(x, self.second.weight)


@pytest.mark.parametrize(
    ("twice", "message"),
    [(True, "0.first runs more than once in a forward pass"), (False, "0.second is never called in a forward pass")],
)
def test_linears_that_do_not_run_once_are_refused(twice: bool, message: str, tmp_path: Path) -> None:
    class Stack(Causal):
        def blocks(self) -> tuple[str, ...]:
            return ("0",)

        def logits(self, batch: dict[str, Tensor]) -> Tensor:
            return self.network(batch["inputs"])

    model = Stack(nn.Sequential(Odd(twice), nn.Linear(8, 3)), Recipe("tests.odd", {}))
    data = bundle_of({"inputs": torch.randn(6, 4, 8), "labels": torch.zeros(6, dtype=torch.int64)})
    with pytest.raises(InputError, match=message):
        applied_to(Wanda(), model, data, tmp_path)
    skipped = Wanda(skip=("0.first" if twice else "0.second",))
    assert len(applied_to(skipped, model, data, tmp_path).plan.matrices) == 1


class Wired(nn.Module):
    """Two linears that read the same, or (crossed) one what the other gives."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.first, self.second, self.crossed = nn.Linear(8, 8), nn.Linear(8, 8), crossed

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.second(y if self.crossed else x)


@pytest.mark.usefixtures("threads_end")
def test_blocks_of_one_kind_that_are_wired_differently(tmp_path: Path) -> None:
    class Stack(Causal):
        def blocks(self) -> tuple[str, ...]:
            return ("0", "1", "2")

        def logits(self, batch: dict[str, Tensor]) -> Tensor:
            return self.network(batch["inputs"])

    model = Stack(nn.Sequential(Wired(False), Wired(True), Wired(False)), Recipe("tests.wired", {}))
    data = bundle_of({"inputs": torch.randn(6, 4, 8), "labels": torch.zeros(6, dtype=torch.int64)})
    with pytest.raises(RunError, match="1.second reads something else than 1.first, unlike in other blocks"):
        applied_to(Wanda(schedule="one_forward"), model, data, tmp_path)
    done = applied_to(Wanda(schedule="true_sequential"), model, data, tmp_path)
    digests = {name: facts["statistic"] for name, facts in done.plan.details["matrices"].items()}
    assert digests["0.first"] == digests["0.second"] and digests["1.first"] != digests["1.second"]
