"""Writing with a cache: the same tokens as without, caches that shrink with what is cut, and honest timing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import evals.decode as decode_module
from data.corpus import token_hash
from evals.base import Subject
from evals.compressed import ONLY_COMPRESSED, only_compressed
from evals.decode import UNITS, Decode, weight_memory
from evals.decode_runs import DecodeRun
from evals.prompts import batch_of_prompts
from models.base import PrunableModel
from models.decoding import Decoding, cache_bytes, decoded, forked, generate, greedy, positions_of, rewind
from prune.base import Plan
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of, causal, toy_on_tokens
from tests.test_contract import random_plan
from tests.test_memory import ERRORS
from utils.errors import InputError

KINDS = ["llama", "llama_plain", "mistral", "qwen2", "qwen3"]
FAST: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 6, "seconds": 0.02, "warmup": 1, "blocks": 3}


def by_full_passes(model: PrunableModel, prompt: Tensor, count: int) -> Tensor:
    """The likeliest tokens, each from a pass over everything before it."""
    read = prompt
    for _ in range(count):
        with torch.inference_mode():
            read = torch.cat([read, model.logits({"input_ids": read})[:, -1].argmax(-1, keepdim=True)], dim=1)
    return read[:, prompt.shape[1] :]


def emptied(model: PrunableModel) -> PrunableModel:
    """All heads of the first layer and all neurons of the second gone."""
    heads, _, _, neurons = model.unit_groups()
    none = torch.tensor([], dtype=torch.int64)
    return cut(model, Plan.of(model, {heads.name: none, neurons.name: none}))


CUTS: dict[str, Callable[[PrunableModel], PrunableModel]] = {
    "dense": lambda model: model,
    "cut": lambda model: cut(model, random_plan(model, 0)),
    "emptied": emptied,
}


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_no_token(kind: str, how: str) -> None:
    model, samples = ADAPTERS[kind]()
    model, prompt = CUTS[how](model), samples["input_ids"][:3, :4]
    assert isinstance(model, Decoding)
    expected = by_full_passes(model, prompt, 12)  # beyond mistral's window of 4
    assert torch.equal(generate(model, prompt, 12), expected)
    data = bundle_of(samples)
    run = DecodeRun(model, batch_of_prompts(data, 3, 4), 6)
    for _ in range(2):  # a second call finds the prompt's cache as it was
        assert torch.equal(run.ready(), by_full_passes(model, batch_of_prompts(data, 3, 4), 6))
    assert run.first_token() == run.first.tolist()


def test_a_forgetful_cache_would_be_noticed() -> None:
    model, samples = ADAPTERS["llama"]()
    assert isinstance(model, Decoding)
    prompt = samples["input_ids"][:3, :6]
    logits = []
    for tokens in (prompt, prompt[:, -1:]):
        with torch.inference_mode():
            logits.append(model.next_logits(tokens, positions_of(tokens, 6 - tokens.shape[1]), model.new_cache()))
    assert not torch.allclose(*logits, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_fixed_length_says_the_same(kind: str) -> None:
    model, samples = ADAPTERS[kind]()
    model, prompt = emptied(model), samples["input_ids"][:2, :5]
    assert isinstance(model, Decoding)
    cache = model.new_cache(14)
    with torch.inference_mode():
        for _ in range(2):
            token = greedy(model.next_logits(prompt, positions_of(prompt), cache))
            for _ in range(2):  # set back to the prompt alone, beyond mistral's window of 4
                found = decoded(model.next_logits, token, 5, 9, cache)
                assert torch.equal(found, by_full_passes(model, prompt, 9))
                rewind(cache, 5)
            rewind(cache, 0)


def test_bytes_of_a_cache_are_counted_and_shrink_with_the_heads() -> None:
    model, samples = causal("llama")
    data, pruned = (
        bundle_of(samples),
        cut(model, Plan.of(model, {g.name: torch.tensor([0]) for g in model.unit_groups()})),
    )
    found = Decode(batches=(2,), **FAST).measure([Subject(model, data), Subject(pruned, data)])
    tokens = 8 + 6 - 1  # the last one is not read any more
    expected = [
        2 * 2 * layers * 2 * tokens * 4 * 4 for layers in (3, 1)
    ]  # K and V, layers, heads, batch, width, float32
    assert [figures["kv_cache_batch_2"].value for figures in found] == expected
    for figures, subject in zip(found, (model, pruned), strict=True):
        parameters = sum(p.numel() * 4 for p in subject.network.parameters())
        buffers = sum(b.numel() * b.element_size() for b in subject.network.buffers())
        assert figures["weight_memory"].value == parameters + buffers


def test_a_fork_leaves_the_prompt_alone() -> None:
    model, samples = causal("llama")
    prompt = samples["input_ids"][:1, :5]
    cache = model.new_cache()  # type: ignore[attr-defined]
    with torch.inference_mode():
        model.next_logits(prompt, positions_of(prompt), cache)  # type: ignore[attr-defined]
        before = cache_bytes(cache)
        twin = forked(cache)
        model.next_logits(prompt[:, :1], positions_of(prompt[:, :1], 5), twin)  # type: ignore[attr-defined]
    assert cache_bytes(cache) == before and cache_bytes(twin) == before * 6 // 5


def test_every_figure_has_its_unit_and_its_own_measurement() -> None:
    model, samples = causal("llama")
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    found = Decode(batches=(1, 3), **FAST).measure([Subject(model, data), Subject(pruned, data)])
    for figures in found:
        assert set(figures) == {"weight_memory", *(f"{name}_batch_{b}" for name in UNITS for b in (1, 3))}
        for b in (1, 3):
            decode, first, prefill = (figures[f"{n}_batch_{b}"] for n in ("decode", "first_token", "prefill"))
            assert (decode.unit, first.unit, prefill.unit) == ("tokens/s", "ms", "ms")
            assert decode.value == pytest.approx(b * 5 * 1000 / decode.details["p50"])
            assert first.value == pytest.approx(first.details["p50"]) and first.details["batch"] == b
            assert first.details["n"] >= 6 and decode.details["n"] >= 6
            new_tokens_over_throughput = 6 * b * 1000 / float(decode.value or 0)
            assert first.value != pytest.approx(new_tokens_over_throughput, rel=1e-6), "timed, not derived"
    dense = found[0]["decode_batch_1"]
    assert found[0]["decode_batch_1"].details["speedup"] == pytest.approx(1.0)
    expected = by_full_passes(model, batch_of_prompts(data, 1, 8), 6)
    assert dense.details["output_hash"] == token_hash(expected), "what is timed is what the model says"


def test_slow_prefill_and_slow_steps_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that waits 20 ms before each prompt: prefill and first token show it, decoding does not."""
    import time

    model, samples = causal("llama")
    data, slow = bundle_of(samples), model.copy()
    plain = slow.next_logits  # type: ignore[attr-defined]

    def waiting(tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        if tokens.shape[1] > 1:
            time.sleep(0.02)
        return plain(tokens, positions, cache)

    monkeypatch.setattr(slow, "next_logits", waiting, raising=False)
    fast, late = Decode(batches=(1,), **FAST).measure([Subject(model, data), Subject(slow, data)])
    for name in ("prefill_batch_1", "first_token_batch_1"):
        assert float(late[name].value or 0) >= 20 > float(fast[name].value or 99)
    assert 0.2 < late["decode_batch_1"].details["speedup"] < 5


def zeroed(model: PrunableModel) -> PrunableModel:
    """Two zeros in every four weights of the linears in the blocks."""
    twin = model.copy()
    for name, weight in twin.network.named_parameters():
        if "layers" in name and weight.ndim == 2:
            weight.data.view(-1, 4)[:, :2] = 0
    return twin


def test_zeros_alone_are_compression_only() -> None:
    model, samples = causal("llama")
    data, sparse = bundle_of(samples), zeroed(model)
    found = Decode(batches=(1,), **FAST).measure([Subject(model, data), Subject(sparse, data)])
    assert all(figure.value is not None for figure in found[0].values())
    for name in ("prefill", "first_token", "decode"):
        assert found[1][f"{name}_batch_1"].value is None and found[1][f"{name}_batch_1"].reason == ONLY_COMPRESSED
    assert found[1]["kv_cache_batch_1"].value == found[0]["kv_cache_batch_1"].value
    asked = Decode(batches=(1,), semi_structured="auto", **FAST).measure([Subject(model, data), Subject(sparse, data)])
    assert "run on CUDA alone, and this is a cpu" in str(asked[1]["decode_batch_1"].reason)


def test_only_compressed_tells_cuts_from_zeros() -> None:
    model, _ = causal("llama")
    assert only_compressed(zeroed(model), model)
    assert not only_compressed(model, model) and not only_compressed(model.copy(), model)
    assert not only_compressed(cut(model, random_plan(model, 0)), model)
    assert not only_compressed(cut(zeroed(model), random_plan(model, 0)), model), "what is smaller may be faster"
    assert not only_compressed(model, zeroed(model)), "filled weights are no compression"


def test_bad_input_and_models_that_write_nothing() -> None:
    model, samples = causal("llama")
    with pytest.raises(InputError, match="evals.decode.prompt_tokens=20: its prompt must be at most 16 tokens"):
        Decode(prompt_tokens=20, new_tokens=8).check(model, bundle_of(samples))
    wrong: list[dict[str, Any]] = [{"batches": ()}, {"batches": (0,)}, {"batches": (1, 1)}, {"new_tokens": 1}]
    for settings in wrong:
        with pytest.raises(InputError):
            Decode(**settings)
    toy, vectors = toy_on_tokens()
    found = Decode(batches=(2,)).measure([Subject(toy, bundle_of(vectors))])[0]
    assert {figure.reason for figure in found.values()} == {"model=toy_encoder does not continue text"}
    assert weight_memory(toy).value


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", ["ready", "first_token", "cache_bytes"])
def test_running_out_of_memory_is_a_result(
    at: str, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = causal("llama")

    def scarce(self: DecodeRun) -> Any:
        if len(self.host) > 1:
            raise error()
        return plain(self)

    plain = getattr(DecodeRun, at)
    monkeypatch.setattr(DecodeRun, at, scarce)
    found = Decode(batches=(1, 64), **FAST).measure([Subject(model, bundle_of(samples))])[0]
    missing = {name for name, figure in found.items() if figure.value is None}
    everything = {f"{name}_batch_64" for name in UNITS}
    assert missing == {"ready": everything, "first_token": {"first_token_batch_64"}}.get(at, {"kv_cache_batch_64"})
    assert {found[name].reason for name in missing} == {"out of memory at batch 64"}


def test_other_errors_are_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = causal("llama")

    def broken(self: DecodeRun) -> Tensor:
        raise RuntimeError("shapes do not fit")

    for at in ("ready", "first_token", "cache_bytes"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="shapes do not fit"):
            patch.setattr(DecodeRun, at, broken)
            Decode(batches=(1,), **FAST).measure([Subject(model, bundle_of(samples))])


def test_a_figure_that_compiling_went_into_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that appear while a call is timed take the figure away; how long they took before is in its details."""
    model, samples = causal("llama")
    made = iter(range(1000))

    def ready(self: DecodeRun) -> Tensor:
        self.compiled, self.compile_seconds = False, 1.5  # runs eager, so that nothing is really compiled
        self.step = self.model.next_logits  # type: ignore[attr-defined]
        return plain(self)

    plain = DecodeRun.ready
    monkeypatch.setattr(DecodeRun, "ready", ready)
    metric, subjects = Decode(batches=(1,), compiled=True, **FAST), [Subject(model, bundle_of(samples))]
    steady = metric.measure(subjects)[0]["decode_compiled_batch_1"]
    assert steady.value and steady.details["compile_seconds"] == 1.5
    monkeypatch.setattr(decode_module, "compiled_graphs", lambda: next(made))
    found = metric.measure(subjects)[0]
    assert found["decode_compiled_batch_1"].reason == "torch.compile made 1 more graphs while it was timed"
    assert found["decode_batch_1"].value, "eager figures have nothing to do with graphs"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_compiled_says_and_counts_the_same(kind: str) -> None:
    model, samples = causal(kind)
    data, pruned = bundle_of(samples), cut(model, random_plan(model, 0))
    found = Decode(batches=(2,), compiled=True, **FAST).measure([Subject(model, data), Subject(pruned, data)])
    for figures in found:
        eager, compiled = figures["decode_batch_2"], figures["decode_compiled_batch_2"]
        if compiled.value is None:
            pytest.skip(str(compiled.reason))
        assert eager.details["output_hash"] == compiled.details["output_hash"] and compiled.details["compiled"]
        # compiling is no part of what is timed, and is said
        assert compiled.details["compile_seconds"] > 0.5 > compiled.details["first_call"] / 1000
        if kind == "llama":  # mistral's growing cache forgets what is behind its window
            assert figures["kv_cache_compiled_batch_2"].value == float(figures["kv_cache_batch_2"].value or 0) * 14 / 13
