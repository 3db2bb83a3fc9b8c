"""Text side by side: what is counted, how it is drawn, and that it is the model's own."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.corpus import Corpus, Document
from data.language_modelling import LanguageModelling
from evals.base import Subject
from evals.continuations import distinct, ngrams, nucleus, repetition_rate, sampler
from evals.generation import Generation, mean_cost
from evals.prompts import batch_of_prompts, first_words
from evals.texts import fenced, text_blocks
from main import run
from models.base import PrunableModel
from models.decoding import generate
from models.hf import ends_of
from prune.surgery import cut
from tests.adapters import ADAPTERS, bundle_of, toy_on_tokens
from tests.conftest import Compose
from tests.test_contract import random_plan
from tests.test_llama import bytes_reader
from utils.errors import InputError

TINY = (
    "+experiment=tiny_llama_wanda", "data.length=32", "data.calibration_length=16", "data.calibration_samples=8",
    "data.calibration_batch_size=4", "data.validation_samples=4", "data.train_samples=32", "model.training.epochs=1",
    "model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, max_position_embeddings: 64}",
)  # fmt: skip


def subjects(kind: str = "llama") -> list[Subject]:
    model, samples = ADAPTERS[kind]()
    data = bundle_of(samples)
    return [Subject(model, data), Subject(cut(model, random_plan(model, 0)), data)]


def costs_by_loop(model: PrunableModel, prompt: Tensor, new: list[int]) -> float:
    """Mean nats of each new token, one whole pass a token."""
    read, total = prompt.tolist(), 0.0
    for token in new:
        with torch.inference_mode():
            logits = model.logits({"input_ids": torch.tensor([read])})[0, -1]
        total -= float(logits.log_softmax(-1)[token])
        read.append(token)
    return total / len(new)


def test_counts_by_hand() -> None:
    assert ngrams("abcd", 3) == [("a", "b", "c"), ("b", "c", "d")] and ngrams("ab", 3) == []
    assert distinct(["aaab"], 1) == 2 / 4 and distinct(["aaab"], 2) == 2 / 3
    assert distinct(["ab", "ab"], 2) == 1 / 2, "texts are counted together, and no n-gram spans two"
    assert distinct(["a"], 2) is None
    assert repetition_rate("abcabcabc", 3) == 1 - 3 / 7
    assert (
        repetition_rate("abcdefgh") == 0 and repetition_rate("aaaaaaaa") == 1 - 1 / 5 and repetition_rate("abc") is None
    )


def test_the_nucleus_is_the_fewest_tokens_that_reach_the_mass() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.4], [0.7, 0.2, 0.1]]).log()
    assert torch.allclose(nucleus(logits, top_p=0.85), torch.tensor([[0, 5 / 9, 4 / 9], [7 / 9, 2 / 9, 0]]), atol=1e-6)
    assert torch.equal(nucleus(logits, top_p=1e-9), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    for temperature in (1e-9, 1e-37):  # so cold that the likeliest takes it all
        assert torch.equal(nucleus(logits, temperature), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    cold = nucleus(logits, temperature=0.5)
    assert torch.allclose(cold[0], torch.tensor([0.01, 0.25, 0.16]) / 0.42, atol=1e-6)


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(4000, 3)
    drawn = sampler(0, 1.0, 1.0)(logits)
    assert torch.equal(drawn, sampler(0, 1.0, 1.0)(logits)) and not torch.equal(drawn, sampler(1, 1.0, 1.0)(logits))
    shares = torch.bincount(drawn.flatten(), minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.03)
    assert set(sampler(0, 1.0, 0.85)(logits).flatten().tolist()) == {1, 2}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_figures_are_those_of_a_loop(kind: str) -> None:
    pair = subjects(kind)
    found = Generation(count=2, prompt_tokens=5, new_tokens=9, modes=("greedy",)).measure(pair)
    for subject, figures in zip(pair, found, strict=True):
        texts = figures["greedy_perplexity"].details["continuations"]
        costs = []
        for text, prompt in zip(texts, batch_of_prompts(pair[0].data, 2, 5), strict=True):
            assert text["tokens"] == generate(subject.model, prompt[None], 9)[0].tolist()  # type: ignore[arg-type]
            assert text["prompt"] == " ".join(map(str, prompt.tolist()))
            costs.append(costs_by_loop(pair[0].model, prompt, text["tokens"]))
            assert text["perplexity"] == pytest.approx(math.exp(costs[-1]), rel=1e-4)
        assert figures["greedy_perplexity"].value == pytest.approx(math.exp(sum(costs) / 2), rel=1e-4)
        tokens = [text["tokens"] for text in texts]
        assert figures["greedy_distinct_2"].value == distinct(tokens, 2)
        assert figures["greedy_repetition"].value == pytest.approx(sum(map(repetition_rate, tokens)) / 2)  # type: ignore[arg-type]
    assert found[0]["greedy_perplexity"].value != found[1]["greedy_perplexity"].value


def test_the_dense_model_judges_every_model() -> None:
    dense, pruned = subjects()
    prompt, new = torch.tensor([4, 9, 7]), torch.tensor([3, 3, 8, 12])
    own = mean_cost(pruned.model, prompt, new)
    assert own == pytest.approx(costs_by_loop(pruned.model, prompt, new.tolist()), rel=1e-5)
    assert mean_cost(dense.model, prompt, new) != pytest.approx(own, rel=1e-3)


def test_sampling_repeats_and_leaves_earlier_prompts_alone() -> None:
    pair = subjects()
    of = lambda **more: Generation(prompt_tokens=4, new_tokens=12, **more).measure(pair)[1]  # noqa: E731
    texts = lambda found: [t["tokens"] for t in found["sampled_perplexity"].details["continuations"]]  # noqa: E731
    two, three = texts(of(count=2)), texts(of(count=3))
    assert three[:2] == two and texts(of(count=2)) == two
    assert texts(of(count=2, seed=1)) != two
    assert of(count=2)["sampled_perplexity"].details["temperature"] == 0.8


def test_texts_prompts_and_where_the_end_was() -> None:
    model = bytes_reader()
    end = model.preprocessing.tokenizer.eos_token_id
    with torch.no_grad():
        model.network.get_parameter("model.embed_tokens.weight")[end] *= 50  # it will be written, and again
    subject = Subject(model, bundle_of({"input_ids": torch.randint(3, 50, (6, 9))}))
    found = Generation(prompts=("if", "a longer text"), new_tokens=20, modes=("greedy",)).measure([subject])[0]
    texts = found["greedy_perplexity"].details["continuations"]
    assert [text["prompt"] for text in texts] == ["<s>if", "<s>a longer text"]
    assert all(len(text["tokens"]) == 20 for text in texts), "no token stops a text"
    for text in texts:
        assert text["eos_at"] == (text["tokens"].index(end) if end in text["tokens"] else None)
    assert all("eos_at" in text for text in texts)


def test_any_of_several_ends_counts() -> None:
    """Models tuned to talk name several in their configuration; one that the tokenizer does not know of is no end."""
    configuration = SimpleNamespace(eos_token_id=[7, 9])
    assert ends_of(9, configuration) == (7, 9)
    assert ends_of(5, configuration) == (5,) and ends_of(None, configuration) == ()
    assert ends_of(5, SimpleNamespace(eos_token_id=2)) == (5,) and ends_of(5, SimpleNamespace()) == (5,)
    model = bytes_reader()
    subject = Subject(model, bundle_of({"input_ids": torch.randint(3, 50, (6, 9))}))
    generation = Generation(prompts=("if",), new_tokens=20, modes=("greedy",))
    tokens = generation.measure([subject])[0]["greedy_perplexity"].details["continuations"][0]["tokens"]
    model.preprocessing = replace(model.preprocessing, ends=(tokens[5], tokens[3]))  # type: ignore[type-var]
    text = generation.measure([subject])[0]["greedy_perplexity"].details["continuations"][0]
    assert text["eos_at"] == min(tokens.index(tokens[5]), tokens.index(tokens[3])) and text["tokens"] == tokens


def test_beginnings_of_documents_are_spread() -> None:
    class Words:
        eos_token_id = None

        def __call__(self, text: Any, **settings: bool) -> dict[str, Any]:
            texts = [text] if isinstance(text, str) else text
            found = [[int(word) for word in words.split()] for words in texts]
            return {"input_ids": found[0] if isinstance(text, str) else found}

    texts = [f"{n} {n + 1} {n + 2} {n + 3}" for n in range(0, 80, 10)]
    corpus = Corpus("x", torch.arange(99), [Document(t, t) for t in texts], Words(), "p")
    data = bundle_of({"input_ids": torch.randint(3, 50, (6, 9))})
    data = type(data)(**{**vars(data), "task": LanguageModelling(99, corpus=corpus)})
    assert [p.tolist() for p in first_words(data, 2, 3)] == [[0, 1, 2], [40, 41, 42]]
    assert [p.tolist() for p in first_words(data, 2, 9)] == [[*range(9)], [*range(9, 18)]], "too short: the stream"


def test_bad_input_and_models_without_text() -> None:
    pair = subjects()
    data = pair[0].data
    with pytest.raises(InputError, match=r"evals.generation.prompt_tokens=20: .* at most 14 tokens .* without 10 new"):
        Generation(prompt_tokens=20, new_tokens=10).check(pair[0].model, data)
    reader = bytes_reader()
    with pytest.raises(InputError, match=r"evals.generation.prompts\[1\] tokens=41: a prompt must be at most 34"):
        Generation(prompts=("short", "x" * 40), new_tokens=30).check(reader, data)
    with pytest.raises(InputError, match="needs a model with a tokenizer"):
        Generation(prompts=("short",)).check(pair[0].model, data)
    wrong: list[dict[str, Any]] = [
        {"prompts": ()}, {"modes": ()}, {"modes": ("greedy", "greedy")}, {"modes": ("beam",)}, {"top_p": 0.0},
        {"top_p": 1.5}, {"temperature": 0.0}, {"new_tokens": 0},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(InputError):
            Generation(**settings)
    toy, samples = toy_on_tokens()
    none = Generation().measure([Subject(toy, bundle_of(samples))])[0]["greedy_perplexity"]
    assert none.value is None and none.reason == "model=toy_encoder does not continue text"


def test_blocks_hold_any_text() -> None:
    assert fenced("a ``` b") == "````text\na ``` b\n````"
    text = {"prompt": "p", "text": "t", "tokens": [1], "perplexity": 2.0, "distinct_2": None, "eos_at": 3}
    models = {"Dense": {"greedy_perplexity": {"value": 2.0, "continuations": [text]}},
              "Pruned": {"greedy_perplexity": {"value": None}}}  # fmt: skip
    blocks = text_blocks(models)
    assert "**Dense, greedy** (perplexity 2, end of text at token 3)" in blocks and "Pruned" not in blocks
    assert text_blocks({"Dense": {"loss": {"value": 1.0}}}) == "" and text_blocks({}) == ""


def test_a_run_shows_both_sides(composed: Compose, tmp_path: Path) -> None:
    generation = ("evals=[generation]", "evals.generation.new_tokens=12", "evals.generation.count=2")
    record = run(composed(*TINY, *generation, f"storage={tmp_path}/s"), tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    for part in ("## What they write", "### Prompt 2", "**Dense, greedy**", "**Pruned, sampled**"):
        assert part in report
    shown = record.to_json()["pruned"]["greedy_perplexity"]
    assert shown["new_tokens"] == 12 and len(shown["continuations"]) == 2 and shown["continuations"][0]["text"]
    refused = composed(*TINY, *generation[:1], "evals.generation.new_tokens=60", f"storage={tmp_path}/none")
    with pytest.raises(InputError, match="evals.generation.prompt_tokens=16"):
        run(refused, tmp_path / "refused")
    assert not list((tmp_path / "none").rglob("checkpoint*")), "nothing may have been trained"
