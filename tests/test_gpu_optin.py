"""OPTIN's engines on CUDA against the CPU; run with `-m gpu`."""

import pytest
import torch
from scipy.stats import spearmanr

from prune.optin.combine import TOKEN
from prune.optin.exact import exact_losses
from prune.optin.precision import Precision
from prune.optin.teacher import Settings
from prune.rankers.optin import Optin
from tests.adapters import ADAPTERS, bundle_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("adapter", ["toy_images", "deit", "bert"])
def test_exact_losses_equal_the_cpus(adapter: str) -> None:
    model, samples = ADAPTERS[adapter]()
    data = bundle_of(samples, 1)
    kinds = ["head", "neuron", *([] if model.why_not_mergeable() else [TOKEN])]
    expected = exact_losses(model, data, Settings(), kinds=kinds)
    model.network.to("cuda")
    found = exact_losses(model, data, Settings(), kinds=kinds)
    for term, groups in expected.items():
        for name, values in groups.items():
            scale = float(values.abs().max().clamp(min=1e-2))
            assert (values - found[term][name]).abs().max() <= 2e-3 * scale, (term, name)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_faster_passes_rank_as_float32(engine: str, precision: Precision) -> None:
    model, samples = ADAPTERS["toy_images"]()
    model.network.to("cuda")
    data = bundle_of(samples, 1)
    full, fast = (
        Optin(engine=engine, precision=p).rank(model, data).terms["md"]  # type: ignore[arg-type]
        for p in ("float32", precision)
    )
    pairs = [torch.cat([terms[name] for name in full]).numpy() for terms in (full, fast)]
    assert float(spearmanr(*pairs)[0]) >= 0.99  # type: ignore[arg-type]


def test_memory_is_bounded_and_running_out_halves_the_stack() -> None:
    model, samples = ADAPTERS["deit"]()
    model.network.to("cuda")
    data = bundle_of(samples, 1)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    few = exact_losses(model, data, Settings(memory_gb=0.01))
    assert torch.cuda.max_memory_allocated() - start < 0.1 * 2**30
    many = exact_losses(model, data, Settings(memory_gb=2.0))
    for name, values in few["md"].items():
        assert torch.allclose(values, many["md"][name], rtol=1e-3, atol=1e-5)


def test_a_pass_of_candidates_never_waits_for_the_device() -> None:
    from prune.gates import undisturbed
    from prune.optin.candidates import group_losses
    from prune.optin.teacher import observe

    model, samples = ADAPTERS["deit"]()
    model.network.to("cuda")
    data = bundle_of(samples, 1)
    with undisturbed(model.network), torch.inference_mode():
        teacher = observe(model, model.place(data.calibration[0]), Settings())
        group = model.unit_groups()[1]
        group_losses(model, data, teacher, group, Settings(), lambda note: None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            group_losses(model, data, teacher, group, Settings(), lambda note: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
