"""OPTIN's losses against the released code's and against a plain loop; its combination, search and sketch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.optin_golden import deviations, golden_bundle, golden_model, read
from data.base import DataBundle
from models.base import PrunableModel
from models.cost import cost_model
from prune.budget import Budget
from prune.gates import gated
from prune.optin.combine import Positions, combined, terms_of
from prune.optin.exact import exact_losses
from prune.optin.losses import draw_rows, feature_rows, manifold_distance
from prune.optin.precision import computed_in
from prune.optin.search import two_kinds
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings, compared_points
from prune.rankers.optin import Optin
from prune.ranking import ranked
from tests.adapters import ADAPTERS, batch, bundle_of
from utils.errors import InputError, RunError
from utils.hooks import captured, replaying, watched
from utils.storage import Artifact, Scratch, Store

GOLDEN = sorted((Path(__file__).parent / "golden").glob("optin_*.safetensors"))
WITH_TRAJECTORY = [name for name in ADAPTERS if name not in ("fused_qkv", "grouped_query", "conv")]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_losses_match_the_released_code(path: Path) -> None:
    assert len(GOLDEN) == 2
    for name, _, tolerances in deviations(path):
        assert tolerances < 0.1, name


def plain_losses(model: PrunableModel, data: DataBundle, settings: Settings) -> dict[str, dict[str, Tensor]]:
    """One full forward pass a unit through a gate of zero; whole Grams, one unit at a time."""
    found = {term: {g.name: torch.zeros(g.count) for g in model.unit_groups()} for term in ("md", "md_final", "kd")}
    points = model.feature_points()
    for samples in data.calibration:
        with captured(model.network, points) as dense:
            wanted = model.logits(samples)
        for group in model.unit_groups():
            for unit in range(group.count):
                gate = torch.ones(group.count)
                gate[unit] = 0
                with gated(model, {group.name: gate}), captured(model.network, points) as moved:
                    given = model.logits(samples)
                for name in compared_points(model, group.layer):
                    x, y = (_rows(side[name], samples, model.feature_axis) for side in (dense, moved))
                    term = "md_final" if name in points[len(model.blocks()) :] else "md"
                    found[term][group.name][unit] += (x @ x.T - y @ y.T).square().sum() / len(data.calibration)
                deviation = data.task.deviation(given, wanted, samples).sum()
                found["kd"][group.name][unit] += settings.temperature**2 * deviation / len(data.calibration)
    return found


def _rows(features: Tensor, samples: dict[str, Tensor], axis: int) -> Tensor:
    rows = normalize(feature_rows(features, axis=axis)[0].float(), dim=-1)
    mask = samples.get("attention_mask")
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.flatten().bool()]


@pytest.mark.parametrize("name", WITH_TRAJECTORY)
def test_losses_equal_a_plain_loop(name: str) -> None:
    model, samples = ADAPTERS[name]()
    data, settings = bundle_of(samples, batches=2), Settings()
    with torch.inference_mode():
        expected = plain_losses(model, data, settings)
    before = {n: t.clone() for n, t in model.network.state_dict().items()}
    actual = exact_losses(model, data, settings)
    for term, groups in actual.items():
        for group, values in groups.items():
            scale = expected[term][group].abs().max().clamp(min=1e-2)
            assert (values - expected[term][group]).abs().max() <= 1e-3 * scale, (term, group)
    assert all(torch.equal(before[n], t) for n, t in model.network.state_dict().items())
    assert not any("forward" in vars(module) for module in model.network.modules())


@pytest.mark.parametrize("rows", [10, 40])
def test_both_forms_of_the_distance_agree_with_double_grams(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = normalize(torch.randn(rows, 16, generator=generator), dim=-1)
    masked = normalize(dense + 1e-3 * torch.randn(3, rows, 16, generator=generator), dim=-1)
    x, y = dense.double(), masked.double()
    expected = (x @ x.T - y @ y.transpose(1, 2)).square().sum(dim=(1, 2))
    assert torch.allclose(manifold_distance(masked, dense).double(), expected, rtol=1e-4)


def test_rows_are_drawn_once_without_padding() -> None:
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    assert draw_rows(9, 768, None, 0) is None
    assert draw_rows(9, 768, valid, 0).tolist() == [0, 1, 3, 6, 7, 8]  # type: ignore[union-attr]
    few = draw_rows(9, 3, valid, 5)
    assert few is not None and set(few.tolist()) <= {0, 1, 3, 6, 7, 8} and len(few) == 3
    assert torch.equal(few, draw_rows(9, 3, valid, 5))  # type: ignore[arg-type]
    assert draw_rows(900, 30, None, 1).tolist() != draw_rows(900, 30, None, 2).tolist()  # type: ignore[union-attr]


def test_padding_does_not_count() -> None:
    model, samples = ADAPTERS["bert"]()
    longer = {n: torch.cat([t, torch.zeros(len(t), 3, dtype=t.dtype)], 1) for n, t in samples.items() if n != "labels"}
    short, long = (
        exact_losses(model, bundle_of(s, 1), Settings()) for s in (samples, longer | {"labels": samples["labels"]})
    )
    for group, values in short["md"].items():
        assert torch.allclose(values, long["md"][group], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("memory_gb", [4.0, 1e-9])
def test_a_killed_ranking_goes_on_bit_for_bit(memory_gb: float, tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data, settings = bundle_of(samples, 2), Settings(memory_gb=memory_gb)
    whole = exact_losses(model, data, settings)
    scratch = _Killing(tmp_path / "left", after=3)
    with pytest.raises(KeyboardInterrupt):
        exact_losses(model, data, settings, scratch)
    assert not any("forward" in vars(module) for module in model.network.modules())
    resumed = exact_losses(model, data, settings, Scratch(tmp_path / "left"))
    assert all(torch.equal(v, resumed[term][g]) for term, groups in whole.items() for g, v in groups.items())


class _Killing(Scratch):
    """Keeps what it is given a few times, then the run is killed."""

    def __init__(self, path: Path, after: int) -> None:
        super().__init__(path)
        object.__setattr__(self, "left", after)

    def save(self, artifact: Artifact) -> None:
        super().save(artifact)
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[attr-defined]
        if self.left == 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def test_out_of_memory_halves_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = ADAPTERS["deit"]()
    data = bundle_of(samples, 1)
    whole = exact_losses(model, data, Settings())
    logits, sizes = model.logits, []

    def scarce(given: dict[str, Tensor]) -> Tensor:
        sizes.append(len(given["inputs"]))
        if len(given["inputs"]) > 6 * 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(given)

    monkeypatch.setattr(model, "logits", scarce)
    found = exact_losses(model, data, Settings())
    assert max(sizes) > 12
    for group, values in whole["md"].items():
        assert torch.allclose(values, found["md"][group], rtol=1e-4, atol=1e-6)


def test_one_constant_a_kind() -> None:
    model, samples = ADAPTERS["deit"]()
    terms = exact_losses(model, bundle_of(samples, 1), Settings())
    groups = model.unit_groups()
    found = combined(terms, groups, 2, "md+kd", 0.5, None)
    for kind in ("head", "neuron"):
        own = [g for g in groups if g.kind == kind]
        distance = torch.cat([(terms["md"][g.name] + terms["md_final"][g.name]) / terms_of(g, 2, True) for g in own])
        deviation = torch.cat([terms["kd"][g.name] for g in own])
        expected = distance + 0.5 * distance.mean() / deviation.mean() * deviation
        assert torch.allclose(torch.cat([found[g.name] for g in own]), expected, rtol=1e-5)
    assert [terms_of(Positions("", layer, "head"), 3, True) for layer in range(3)] == [3, 2, 1]
    assert [terms_of(Positions("", layer, "head"), 3, False) for layer in range(3)] == [2, 1, 1]
    assert [terms_of(Positions("", layer), 3, True) for layer in range(3)] == [3, 2, 2]
    silent = {**terms, "kd": {name: torch.zeros_like(v) for name, v in terms["kd"].items()}}
    only = combined(silent, groups, 2, "md", 0.5, None)
    assert all(torch.equal(v, only[n]) for n, v in combined(silent, groups, 2, "md+kd", 0.5, None).items())


def test_what_acts_at_search_time_hits_the_cache(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    data, store = bundle_of(samples, 1), Store(tmp_path)
    assert not ranked(Optin(), model, data, store).hit
    for other in (
        Optin(lambda_c=0.5), Optin(loss="md"), Optin(constant=2.0), Optin(head_decay=0.5), Optin(last_neuron_decay=0.1),
        Optin(search="optin"), Optin(ratio=0.1), Optin(memory_gb=1.0), Optin(normalize="mean"),
    ):  # fmt: skip
        assert ranked(other, model, data, store).hit, other
    for other in (
        Optin(rows=5),
        Optin(temperature=2.0),
        Optin(seed=1),
        Optin(engine="sketch"),
        Optin(engine="sketch", probes=4),
    ):
        assert not ranked(other, model, data, store).hit, other


@pytest.mark.parametrize("search", ["greedy", "optin"])
@pytest.mark.parametrize("name", ["toy_images", "deit", "bert", "distilbert"])
def test_plans_meet_the_budget(name: str, search: str) -> None:
    model, samples = ADAPTERS[name]()
    costs = cost_model(model, {n: t[:1] for n, t in samples.items()})
    method = Optin(ratio=0.2, search=search)  # type: ignore[arg-type]
    plan = method.plan(model, method.rank(model, bundle_of(samples, 1)), costs)
    assert plan.ratio_reached >= 0.2
    assert all(len(group.kept) >= 1 for group in plan.groups)


def test_the_search_finds_the_best_number_of_heads() -> None:
    model, samples = ADAPTERS["toy_images"]()
    costs = cost_model(model, {n: t[:1] for n, t in samples.items()})
    generator = torch.Generator().manual_seed(4)
    scores = {g: torch.rand(n, generator=generator) for g, n in costs.counts.items()}
    budget = Budget("macs", 0.4, min_keep=0)
    kept = two_kinds(scores, costs, budget)
    limit = budget.limit(costs.total("macs"))

    def worth(chosen: dict[str, Tensor]) -> float:
        return sum(float(scores[name][index].double().sum()) for name, index in chosen.items())

    ranked_units = {
        kind: sorted(
            ((float(v), n, i) for n, values in scores.items() if costs.kinds[n] == kind for i, v in enumerate(values)),
            reverse=True,
        )
        for kind in ("head", "neuron")
    }
    best = -1.0
    for heads in range(len(ranked_units["head"]) + 1):
        for neurons in range(len(ranked_units["neuron"]) + 1):
            units = [*ranked_units["head"][:heads], *ranked_units["neuron"][:neurons]]
            counts = {name: sum(n == name for _, n, _ in units) for name in costs.counts}
            if costs.total("macs", counts) <= limit:
                best = max(best, sum(score for score, *_ in units))
    assert costs.total("macs", {n: len(i) for n, i in kept.items()}) <= limit
    assert worth(kept) == pytest.approx(best)


def test_the_search_says_what_it_cannot_do() -> None:
    model, samples = ADAPTERS["resnet_basic"]()
    costs = cost_model(model, {n: t[:1] for n, t in samples.items()})
    scores = {g: torch.rand(n) for g, n in costs.counts.items()}
    with pytest.raises(InputError, match="every channel must cost the same"):
        two_kinds(scores, costs, Budget("macs", 0.05))
    with pytest.raises(InputError, match="prune.round_to=1"):
        two_kinds(scores, costs, Budget("macs", 0.05, round_to=2))


@pytest.mark.parametrize(("path", "md", "kd"), [(GOLDEN[0], 0.96, 0.98), (GOLDEN[1], 0.98, 0.99)], ids=["bert", "vit"])
def test_the_sketch_ranks_as_the_exact_losses(path: Path, md: float, kd: float) -> None:
    about, tensors = read(path)
    model, data = golden_model(about, tensors), golden_bundle(about, tensors)
    exact = exact_losses(model, data, Settings())
    sketch = sketched_losses(model, data, Settings(), probes=128)
    for group in model.unit_groups():
        if group.kind == "head":
            assert torch.equal(exact["md"][group.name], sketch["md"][group.name]), "heads are scored exactly"

    def neurons(losses: dict[str, dict[str, Tensor]], term: str) -> Tensor:
        final = losses.get("md_final") if term == "md" else None
        return torch.cat(
            [losses[term][g.name] + (final[g.name] if final else 0) for g in model.unit_groups() if g.kind == "neuron"]
        )

    assert float(spearmanr(neurons(exact, "md"), neurons(sketch, "md"))[0]) >= md  # type: ignore[arg-type]
    assert float(spearmanr(neurons(exact, "kd"), neurons(sketch, "kd"))[0]) >= kd  # type: ignore[arg-type]
    ratio = (neurons(sketch, "md") / neurons(exact, "md")).median()
    assert 0.8 < float(ratio) < 1.25, "an estimate of the same quantity"


def test_bad_input_is_refused() -> None:
    plain, samples = ADAPTERS["fused_qkv"]()
    with pytest.raises(InputError, match="0 feature points for 0 blocks"):
        exact_losses(plain, bundle_of(samples), Settings())
    model, samples = ADAPTERS["toy_images"]()
    with pytest.raises(InputError, match="the calibration set is empty"):
        exact_losses(model, replace(bundle_of(samples), calibration=[]), Settings())
    with pytest.raises(InputError, match="lambda_c=-1"):
        Optin(lambda_c=-1)
    small, one = ADAPTERS["resnet_basic"]()[0], batch(3, 1, 1, samples=1)
    with pytest.raises(InputError, match="1 feature rows; the Gram needs at least 2"):
        exact_losses(small, bundle_of(one, 1), Settings())
    model.network.get_parameter("blocks.1.fc1.bias").data[3] = float("nan")
    with pytest.raises(RunError, match="NaN"):
        Optin().rank(model, bundle_of(samples))


def test_a_module_answers_by_one_function_at_a_time() -> None:
    model, samples = ADAPTERS["toy_images"]()
    with replaying(model.network, {"norm": lambda x: x}):
        with pytest.raises(RuntimeError, match="already"), replaying(model.network, {"norm": lambda x: x}):
            pass
        assert "forward" in vars(model.network.get_submodule("norm"))
    assert "forward" not in vars(model.network.get_submodule("norm"))
    assert torch.isfinite(model.logits(samples)).all()


@pytest.mark.parametrize("adapter", ["deit", "bert_question_answering"])
def test_divergences_are_probed_where_there_are_many_outputs(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune.optin.graph.MOST_OUTPUTS", 0)
    model, samples = ADAPTERS[adapter]()
    data = bundle_of(samples, 1)
    exact, sketch = exact_losses(model, data, Settings()), sketched_losses(model, data, Settings(), probes=2048)
    neurons = [group.name for group in model.unit_groups() if group.kind == "neuron"]
    pairs = [torch.cat([losses["kd"][name] for name in neurons]).numpy() for losses in (exact, sketch)]
    assert float(spearmanr(*pairs)[0]) >= 0.9  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_bfloat16_passes_rank_as_float32(engine: str) -> None:
    model, samples = ADAPTERS["toy_images"]()
    data = bundle_of(samples, 1)
    full, half = (
        Optin(engine=engine, precision=precision).rank(model, data).terms["md"]  # type: ignore[arg-type]
        for precision in ("float32", "bfloat16")
    )
    pairs = [torch.cat([terms[name] for name in full]).numpy() for terms in (full, half)]
    assert float(spearmanr(*pairs)[0]) >= 0.99  # type: ignore[arg-type]
    assert not torch.equal(full["blocks.0.neurons"], half["blocks.0.neurons"])
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_is_on_for_its_passes_alone() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with computed_in("tf32", torch.device("cpu")):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    with computed_in("float32", torch.device("cpu")):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_nothing_before_the_first_block_runs_again() -> None:
    model, samples = ADAPTERS["toy_images"]()
    data, runs = bundle_of(samples, 1), []
    with watched(model.network, ["embed.project"], lambda name, output: runs.append(len(output))):
        exact_losses(model, data, Settings())
    groups = len(model.unit_groups())
    assert set(runs) == {6} and len(runs) == 2 + groups  # features, what precedes the blocks, the calls of each group's
