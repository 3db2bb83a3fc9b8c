"""Two zeros in every four: which layers qualify, who is chosen, and that the dense weights come back."""

import pytest
import torch
from torch import Tensor, nn

import evals.semi_structured as semi_structured
from data.base import DataBundle
from evals.base import Subject
from evals.decode import Decode
from evals.semi_structured import Probe, probed, sparse_kernels, sparse_linears, two_of_four, why_not_sparse
from models.base import PrunableModel
from tests.adapters import bundle_of, causal
from tests.test_decode import FAST, zeroed


def test_two_of_four_by_hand() -> None:
    assert two_of_four(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 5], [0, 1, 2, 0, 3, 3, 0, 0]]))
    assert not two_of_four(torch.tensor([[1.0, 0, 0, 2, 1, 1, 1, 0]])), "a group of three is enough to fail"
    assert not two_of_four(torch.tensor([[0.0, 0, 1, 1, 0, 0]])) and not two_of_four(torch.zeros(0, 4))


def test_only_layers_that_qualify_are_probed_and_the_faster_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "compressed", lambda weight: weight * 1)
    model, _ = causal("llama")
    assert sparse_linears(model.network) == {}
    linears = sparse_linears(zeroed(model).network)
    assert linears and all("layers" in name for name in linears)

    def timer(weight: Tensor, sparse: Tensor, rows: int) -> tuple[float, float]:
        if weight.shape[0] == 12:
            raise RuntimeError("this shape is not served\nand a second line")
        return (1.0, 0.5) if weight.shape[0] == 20 else (1.0, 1.0)

    found = {probe.name: probe for probe in probed(linears, 7, timer)}
    for name, probe in found.items():
        shape = linears[name].weight.shape
        assert probe.faster == (shape[0] == 20), "no slower and no equal one is taken"
        assert (probe.reason == "this shape is not served") == (shape[0] == 12) and probe.to_json()[
            "used"
        ] == probe.faster
    assert any(probe.faster for probe in found.values()) and not all(probe.faster for probe in found.values())


def test_weights_come_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "compressed", lambda weight: weight * 2)
    linears = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    before = {name: module.weight for name, module in linears.items()}
    with pytest.raises(KeyboardInterrupt), sparse_kernels(linears, [Probe("a", 2.0, 1.0), Probe("b", 1.0, 2.0)]):
        assert torch.equal(linears["a"].weight, before["a"] * 2) and linears["b"].weight is before["b"]
        raise KeyboardInterrupt
    assert all(linears[name].weight is weight for name, weight in before.items())


def test_a_cpu_says_why_not() -> None:
    model, _ = causal("llama")
    assert why_not_sparse(zeroed(model)) == "torch's semi-structured kernels run on CUDA alone, and this is a cpu"


def sparse_pair() -> tuple[PrunableModel, PrunableModel, DataBundle]:
    model, samples = causal("llama")
    return model, zeroed(model), bundle_of(samples)


def test_what_the_probe_says_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice, on a machine without such kernels: the probe and the packing are stood in for."""
    model, sparse, data = sparse_pair()
    monkeypatch.setattr("evals.decode.why_not_sparse", lambda model: None)
    monkeypatch.setattr(semi_structured, "compressed", lambda weight: weight * 1)
    rows_seen = []

    def probe_at(linears: dict[str, nn.Linear], rows: int) -> list[Probe]:
        rows_seen.append(rows)
        return [Probe(name, 1.0, 0.5 if rows > 2 else 2.0) for name in linears]

    monkeypatch.setattr("evals.decode.probed", probe_at)
    settings = Decode(batches=(2,), semi_structured="auto", **FAST)
    found = settings.measure([Subject(model, data), Subject(sparse, data)])[1]
    assert rows_seen == [2 * 8, 2 * 8, 2], "prompts have batch times tokens rows, a step has batch rows"
    prefill, decode = found["prefill_batch_2"], found["decode_batch_2"]
    assert prefill.value and all(layer["used"] for layer in prefill.details["semi_structured"])
    assert decode.value is None and "none of 14 layers is faster on a semi-structured kernel at 2 rows" in str(
        decode.reason
    )
    assert not any(layer["used"] for layer in decode.details["semi_structured"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_a_gpu_runs_the_kernels_that_win() -> None:
    torch.manual_seed(0)
    module = nn.Linear(1024, 2048, bias=False, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.view(-1, 4)[:, :2] = 0
    inputs = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    expected = module(inputs)
    (probe,) = probed({"a": module}, 512)
    assert probe.sparse_ms is not None and probe.dense_ms > 0, probe.reason
    with torch.inference_mode(), sparse_kernels({"a": module}, [Probe("a", 2.0, 1.0)]):
        assert type(module.weight.data) is not Tensor or type(module.weight) is not nn.Parameter
        assert torch.allclose(module(inputs), expected, rtol=2e-2, atol=2e-2)
    model, sparse, data = sparse_pair()
    for twin in (model, sparse):
        twin.network.to("cuda", torch.bfloat16)
    figures = Decode(batches=(2,), semi_structured="auto", **FAST).measure(
        [Subject(model, data), Subject(sparse, data)]
    )
    prefill = figures[1]["prefill_batch_2"]
    assert (prefill.value is None) == (not any(layer["used"] for layer in prefill.details["semi_structured"]))
