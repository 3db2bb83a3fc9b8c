"""Where the time goes: kinds, tables, traces, pictures."""

import json
from pathlib import Path

import pytest

from evals.base import Subject
from evals.profile import Profile, by_kind, kind_of
from evals.profile_text import beside
from main import run
from tests.adapters import ADAPTERS, bundle_of
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix product"), ("aten::linear", "matrix product"), ("aten::bmm", "matrix product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::_softmax", "softmax"),
        ("aten::native_layer_norm", "norm"), ("aten::native_batch_norm", "norm"), ("aten::gelu", "activation"),
        ("aten::mkldnn_convolution", "convolution"), ("aten::copy_", "copy and shape"), ("aten::to", "copy and shape"),
        ("aten::add_", "sum and product"), ("aten::topk", "other"), ("aten::embedding", "embedding"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix product"), ("vectorized_elementwise_kernel", "sum and product"),
    ],
)  # fmt: skip
def test_kinds_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profile_adds_up_and_leaves_a_trace() -> None:
    model, samples = ADAPTERS["toy_images"]()
    found = Profile(batch=4, passes=2, rows=3).measure([Subject(model, bundle_of(samples))])[0]["profile"]
    assert found.unit == "ms" and sum(found.details["kinds"].values()) == pytest.approx(found.value)
    assert found.details["kinds"]["matrix product"] > 0 and len(found.details["operators"]) == 3
    assert found.details["operators"][0]["ms"] >= found.details["operators"][1]["ms"]
    assert "traceEvents" in json.loads(found.files["trace.json"]) and b"aten::" in found.files["operators.txt"]


def test_two_profiles_stand_beside_each_other() -> None:
    dense = [{"name": "aten::mm", "calls": 4, "ms": 2.0}, {"name": "aten::gelu", "calls": 1, "ms": 0.5}]
    lines = beside(dense, [{"name": "aten::mm", "calls": 4, "ms": 1.0}, {"name": "aten::cat", "calls": 1, "ms": 0.1}])
    table = [line.split() for line in lines.splitlines()]
    assert ["aten::mm", "4", "2.000", "4", "1.000", "-50%"] in table
    assert ["aten::gelu", "1", "0.500", "-", "-"] in table and ["aten::cat", "-", "-", "1", "0.100"] in table


def test_kinds_add_up() -> None:
    rows = [{"name": "aten::mm", "ms": 1.0}, {"name": "aten::linear", "ms": 2.0}, {"name": "aten::topk", "ms": 4.0}]
    assert by_kind(rows) == {"matrix product": 3.0, "other": 4.0}


def test_a_run_shows_it(small_config: Compose, tmp_path: Path) -> None:
    run(small_config("evals=[profile]"), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## Where the time went" in report and "plots/time_by_kind.png" in report and "aten::" in report
    assert (tmp_path / "trace_profile_dense.json").is_file() and (tmp_path / "plots" / "time_by_kind.png").is_file()
