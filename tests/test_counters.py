"""How counters disagree, pinned: what each leaves out on the cases of the table in docs/measuring.md."""

import logging
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evals.base import Subject
from evals.torchprofile_macs import Torchprofile
from tests.adapters import ADAPTERS, bundle_of

SMALL = dict(width=64, neurons=256, tokens=32, batch=4, classes=2)
SPEC = dict(width=512, neurons=2048, tokens=128, batch=16, classes=2)


class Encoder(nn.Module):
    """Two layers of torch's own encoder, and a head at every token."""

    def __init__(self, width: int, neurons: int, classes: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, neurons, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def by_torch(network: nn.Module, x: Tensor, grad: bool) -> int:
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops() // 2


def by_fvcore(network: nn.Module, *inputs: Tensor, grad: bool = False) -> int:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(network, inputs)
        return int(analysis.unsupported_ops_warnings(False).tracer_warnings("none").total())


def analytic(width: int, neurons: int, tokens: int, batch: int, classes: int) -> int:
    """`N (4 D^2 + 2 D F) + 2 N^2 D` a layer and sample, and the head at every token."""
    layer = tokens * (4 * width**2 + 2 * width * neurons) + 2 * tokens**2 * width
    return batch * (2 * layer + tokens * width * classes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_one_attention_call_counts_the_same_causal_and_grouped(causal: bool, kv_heads: int) -> None:
    q, k = torch.zeros(1, 8, 128, 64), torch.zeros(1, kv_heads, 128, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=kv_heads < 8)
    assert counter.get_total_flops() == 33_554_432


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(SPEC, marks=pytest.mark.slow)])
def test_the_fast_path_hides_whole_layers(sizes: dict[str, int]) -> None:
    network = Encoder(sizes["width"], sizes["neurons"], sizes["classes"]).eval()
    x = torch.zeros(sizes["batch"], sizes["tokens"], sizes["width"])
    head = sizes["batch"] * sizes["tokens"] * sizes["width"] * sizes["classes"]
    assert by_torch(network, x, grad=False) == head, "the fused layers count as nothing: wrong, and known to be"
    assert by_torch(network, x, grad=True) == analytic(**sizes)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert by_torch(network, x, grad=False) == analytic(**sizes)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    if sizes is SPEC:
        assert analytic(**sizes) == 13_423_869_952 and head == 2_097_152
        assert by_fvcore(network, x) == 8_613_003_264
        assert by_fvcore(network, x, grad=True) == pytest.approx(12.908e9, rel=1e-4)


def test_fvcore_leaves_attention_out_and_counts_norms() -> None:
    model, samples = ADAPTERS["toy_images"]()
    from evals.macs import Macs

    data = bundle_of(samples)
    found = Macs().measure([Subject(model, data)])[0]
    tokens, width, depth = 17, 24, 2
    if (fvcore := found["fvcore_flops"]).value is None:
        pytest.skip(str(fvcore.reason))
    shapes = {n: tuple(p.shape) for n, p in model.network.named_parameters()}
    norms = sum(1 for n, s in shapes.items() if "norm" in n and n.endswith("weight") and s == (width,))
    attention = found["macs"].value - fvcore.value + 5 * tokens * width * norms  # type: ignore[operator]
    assert norms == 2 * depth + 1
    assert attention == pytest.approx(depth * 2 * tokens**2 * width, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "macs", "fvcore", "torchprofile"),
    [("deit_small_patch16_224", 4_598_882_304, 4.251e9, 4.601e9)],
)
def test_the_counters_on_deit_small(name: str, macs: int, fvcore: float, torchprofile: float) -> None:
    import timm

    network, x = timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224)
    assert by_torch(network, x, grad=False) == macs
    assert by_fvcore(network, x) == pytest.approx(fvcore, rel=2e-4)
    profiles = pytest.importorskip("torchprofile", reason="torchprofile is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert profiles.profile_macs(network, x) == pytest.approx(torchprofile, rel=2e-4)


@pytest.mark.slow
def test_the_counters_on_bert_base() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    ids = torch.ones(1, 128, dtype=torch.int64)
    for kind, fvcore in (("sdpa", 10.885e9), ("eager", 11.187e9)):
        network = BertForSequenceClassification(BertConfig(**{"attn_implementation": kind, "num_labels": 2})).eval()
        assert by_torch(network, ids, grad=False) == 11_174_217_216
        assert by_fvcore(network, ids) == pytest.approx(fvcore, rel=2e-4), kind


def test_torchprofile_is_an_extra_with_a_reason_where_it_is_missing(monkeypatch) -> None:
    model, samples = ADAPTERS["toy_images"]()
    subject = Subject(model, bundle_of(samples))
    monkeypatch.setattr("evals.torchprofile_macs.find_spec", lambda name: None)
    found = Torchprofile().measure([subject])[0]["torchprofile_macs"]
    assert found.value is None and "requirements-torchprofile.txt" in str(found.reason)
    monkeypatch.undo()
    pytest.importorskip("torchprofile", reason="torchprofile is not installed")
    found = Torchprofile().measure([subject])[0]["torchprofile_macs"]
    assert found.value and found.unit == "torchprofile MAC/sample" and found.details["misses"]
