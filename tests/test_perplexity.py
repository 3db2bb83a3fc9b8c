"""Perplexity against a slow, obvious count, on tiny models and on trained ones."""

import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from data.base import DataBundle, TensorBatches
from data.causal_text import as_batch
from data.corpus import Corpus, Document, token_hash
from data.language_modelling import IGNORED, LanguageModelling, next_tokens, slices, token_costs
from data.pydoc import pydoc
from data.wikitext_pages import detokenized, pages_of, rows_of
from evals.base import Measurement, Subject
from evals.byte_perplexity import BytePerplexity
from evals.documents import padded, rolling_windows, words_in
from evals.loss import Loss
from evals.numerics import numerics
from evals.perplexity import Perplexity
from evals.quality import Quality
from evals.word_perplexity import WordPerplexity
from models.base import Batch, PrunableModel
from models.llama import Llama, llama
from tests.adapters import ADAPTERS, bundle_of, causal
from tests.modules import stirred
from utils.storage import Store

DATA = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (PARE_DATA)")
TEXTS = ["def f(x):\n    return x", " two words ", "é" * 9, "x"]


def reader() -> Llama:
    """A random model that reads bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
    model = llama(settings=sizes, tokenizer="byte")
    stirred(model.network)
    return model


def bundle(model: PrunableModel, texts: list[str], length: int = 8) -> DataBundle:
    tokenizer = model.preprocessing.tokenizer
    tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    documents = [Document(text, f"{text} .") for text in texts]
    corpus = Corpus("some", tokens, documents, tokenizer, "documents")
    batches = TensorBatches(as_batch(corpus.chunks(length)), 2)
    task = LanguageModelling(258, f"some/token-chunk@{length}", corpus)
    prints = {"train": "t", "calibration": "c", "validation": f"v{length}"}
    return DataBundle("some", "language", task, [], batches, 1, batches, as_batch(tokens[None, :length]), prints)


def probabilities(model: PrunableModel, tokens: list[int]) -> list[float]:
    """Log-likelihood of every token but the first, one forward pass for each."""
    found = []
    for end in range(1, len(tokens)):
        with torch.inference_mode():
            logits = model.network(input_ids=torch.tensor([tokens[:end]])).logits[0, -1].double()
        found.append(float(logits[tokens[end]] - logits.exp().sum().log()))
    return found


def measured(metric: Perplexity | WordPerplexity | BytePerplexity, subject: Subject) -> Measurement:
    (found,) = metric.measure([subject])
    (value,) = found.values()
    return value


@pytest.mark.parametrize("length", [2, 5, 8, 40])
def test_token_chunks_are_as_a_slow_count_has_them(length: int) -> None:
    model = reader()
    data = bundle(model, TEXTS)
    tokens = data.task.corpus.tokens.tolist()  # type: ignore[attr-defined]
    chunks = [tokens[first : first + length] for first in range(0, len(tokens) - length + 1, length)]
    means = [-sum(probabilities(model, chunk)) / (length - 1) for chunk in chunks]
    found = measured(Perplexity(length=length), Subject(model, data))
    assert found.value == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert found.details["chunks"] == len(chunks) == len(tokens) // length
    assert found.details["protocol"] == f"some/token-chunk@{length}" and found.unit == "per token"


def test_batch_size_and_storage_change_nothing(tmp_path: Path) -> None:
    model = reader()
    data, store = bundle(model, TEXTS), Store(tmp_path)
    one, many = (measured(Perplexity(length=5, batch=b), Subject(model, data)) for b in (1, 8))
    kept, again = (measured(Perplexity(length=5, batch=8), Subject(model, data, store)) for _ in range(2))
    assert one.value == pytest.approx(many.value, rel=1e-6)
    assert many.value == kept.value == again.value and one.details["token_hash"] == kept.details["token_hash"]
    other = measured(Perplexity(length=4), Subject(model, data, store))
    assert other.details["token_hash"] != kept.details["token_hash"] and other.value != kept.value


def test_no_logits_are_kept(tmp_path: Path) -> None:
    model = reader()
    data = bundle(model, TEXTS)
    for subject in (Subject(model, data), Subject(model, data, Store(tmp_path))):
        assert {answer.shape[1:] for answer, _ in subject.predictions} == {(8, 2)}
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert files < 258 * 4 * len(data.task.corpus.tokens) / 10  # type: ignore[attr-defined]


def test_quality_and_loss_are_of_the_same_costs() -> None:
    model = reader()
    data = bundle(model, TEXTS)
    subject = Subject(model, data)
    (quality,), (loss,) = Quality().measure([subject]), Loss().measure([subject])
    exact = measured(Perplexity(length=8), subject)
    assert quality["token_perplexity"].value == pytest.approx(exact.value)
    assert quality["token_perplexity"].details["protocol"] == exact.details["protocol"]
    assert loss["loss"].value == pytest.approx(math.log(float(exact.value or 0)))
    assert 0 <= float(quality["token_accuracy"].value or 0) < 0.2 and quality["token_accuracy"].unit == "fraction"


def slow_windows(tokens: list[int], prefix: int, most: int) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of each window, by the rule in words."""
    found, done = [], 0
    while done < len(tokens):
        part = tokens[done : done + most]
        before = [prefix, *tokens[:done]]
        room = most - len(part) + 1 if done else 1
        found.append((before[-room:], part))
        done += len(part)
    return found


@pytest.mark.parametrize("most", [3, 10, 34, 100])
def test_rolling_windows_predict_every_token_once(most: int) -> None:
    tokens = list(range(34))
    found = list(rolling_windows(tokens, -7, most))
    assert [token for _, wanted in found for token in wanted if token != IGNORED] == tokens
    assert all(len(read) == len(wanted) <= most for read, wanted in found)
    slow = [((c + p)[:-1], [IGNORED] * (len(c) - 1) + p) for c, p in slow_windows(tokens, -7, most)]
    assert found == slow


def test_the_last_window_is_filled_with_what_came_before() -> None:
    *_, (read, wanted) = rolling_windows(list(range(34)), -7, 10)
    assert read == list(range(23, 33)) and wanted == [IGNORED] * 6 + [30, 31, 32, 33]


def slow_words(text: str) -> int:
    """One more than there are runs of white space."""
    return 1 + sum(a.isspace() and not b.isspace() for a, b in zip(text, "." + text, strict=False))


@pytest.mark.parametrize("most", [4, 64])
def test_documents_are_as_a_slow_count_has_them(most: int) -> None:
    model = reader()
    data, tokenizer = bundle(model, TEXTS), model.preprocessing.tokenizer
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for context, part in slow_windows(ids, tokenizer.bos_token_id, most):
            nats -= sum(probabilities(model, context + part)[len(context) - 1 :])
    words = sum(slow_words(f"{text} .") for text in TEXTS)
    size = sum(len(f"{text} .".encode()) for text in TEXTS)
    subject = Subject(model, data)
    by_word = measured(WordPerplexity(max_length=most, batch=3), subject)
    by_byte = measured(BytePerplexity(max_length=most, batch=3), subject)
    assert by_word.value == pytest.approx(math.exp(nats / words), rel=1e-5) and by_word.details["words"] == words
    assert by_byte.value == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert by_byte.details["bits_per_byte"] == pytest.approx(math.log2(float(by_byte.value or 0)))
    assert by_word.details["prefix"] == "<s>" and by_word.details["documents"] == len(TEXTS)
    ratio = math.log(float(by_word.value or 0)) / math.log(float(by_byte.value or 0))
    assert ratio == pytest.approx(size / words)


def test_empty_pieces_at_the_ends_are_words_too() -> None:
    assert words_in(" a  b\n") == 4 and words_in("a b") == 2


def test_padding_does_not_count() -> None:
    model, samples = causal("llama")
    task, costs = LanguageModelling(50), []
    for ids, mask in zip(*samples.values(), strict=True):
        alone = ids[: int(mask.sum())].tolist()
        costs += [-p for p in probabilities(model, alone)]
    logits = model.logits(samples).detach()
    assert float(task.loss(logits, samples)) == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    assert task.mean_loss([(task.condensed(logits, samples), samples)]) == pytest.approx(sum(costs) / len(costs))
    whole = {"input_ids": samples["input_ids"]}
    assert float(task.loss(logits, whole)) != pytest.approx(sum(costs) / len(costs), rel=1e-3)
    front = {"input_ids": samples["input_ids"].flip(1), "attention_mask": samples["attention_mask"].flip(1)}
    assert int((next_tokens(front) != IGNORED).sum()) == len(costs)


def test_costs_are_float32_whatever_the_logits_are() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 6, 11, generator=generator) * 3).bfloat16()
    wanted = torch.randint(11, (2, 6), generator=generator)
    exact = -logits.double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    found = token_costs(logits, wanted)
    assert found.dtype == torch.float32 and float((found[..., 0] - exact).abs().max()) < 1e-5
    rounded = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    assert float((rounded - exact).abs().max()) > 1e-3, "the check must tell bfloat16 losses from float32 ones"


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    batch: Batch = {"input_ids": torch.randint(11, (2, 7), generator=generator)}
    task = LanguageModelling(11)
    given = torch.stack([logits, other])
    whole = task.condensed(logits, batch), task.deviation(given, logits, batch)
    monkeypatch.setattr("data.language_modelling.ELEMENTS_AT_ONCE", 50)
    assert len(list(slices(logits))) == 4 and len(list(slices(given))) == 7
    parts = task.condensed(logits, batch), task.deviation(given, logits, batch)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def slow_deviation(given: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    sums = torch.zeros(len(given))
    for sample, real in enumerate(mask.tolist()):
        for token, counts in enumerate(real):
            p, q = wanted[sample, token].softmax(0), given[sample, token].softmax(0)
            sums[sample] += counts * float((p * (p / q).log()).sum())
    return sums


def test_deviation_is_the_divergence_at_every_real_token() -> None:
    model, samples = causal("llama")
    task, wanted = LanguageModelling(50), model.logits(samples).detach()
    given = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    slow = slow_deviation(given, wanted, samples["attention_mask"])
    found = task.deviation(torch.stack([given, wanted]), wanted, samples)
    assert torch.allclose(found[0], slow, rtol=1e-4) and float(found[1].abs().max()) < 1e-5
    shown = task.distributions(wanted, samples)
    padded_ones = shown[~samples["attention_mask"].bool()]
    assert bool((padded_ones.softmax(-1)[:, 0] == 1).all()) and bool(torch.isfinite(shown.softmax(-1)).all())
    divergence = task.divergence(given, wanted, 1.0)
    everywhere = slow_deviation(given, wanted, torch.ones_like(samples["attention_mask"]))
    assert float(divergence) == pytest.approx(float(everywhere.sum()) / wanted[..., 0].numel(), rel=1e-4)


def test_a_record_says_what_the_figure_depends_on() -> None:
    model = reader()
    sizes = {"calibration_samples": 2, "calibration_length": 16, "train_samples": 2, "validation_samples": 3}
    data = pydoc(length=32, **sizes, seed=5).prepare(model)  # type: ignore[arg-type]
    subject = Subject(model, data)
    chunks = data.task.corpus.chunks(16)  # type: ignore[attr-defined]
    found = measured(Perplexity(length=16, batch=3), subject).details
    wanted = {"length": 16, "chunks": 3, "batch_size": 3, "seed": 5, "token_hash": token_hash(chunks)}
    numbers = {"dtype": "float32", "compute_dtype": "float32", "loss_dtype": "float32", "attention": "sdpa"}
    assert found.items() >= {**wanted, **numbers, "bos": "first token only"}.items()
    assert found["versions"]["transformers"] == transformers.__version__
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["versions"].keys() >= {
        "datasets",
        "tokenizers",
    }
    assert {"flash", "math"} <= set(found["sdpa_kernels"]) and len(found["text"]) == len(found["tokenizer"]) == 64
    by_document = measured(WordPerplexity(max_length=64), subject).details
    assert by_document["token_hash"] != found["token_hash"] and by_document["windows"] >= by_document["documents"]
    assert by_document.items() >= {"attention": "sdpa", "batch_size": 4, "text": found["text"]}.items()
    other = pydoc(length=16, **sizes).prepare(model)  # type: ignore[arg-type]
    assert other.task.token_hash == found["token_hash"] != data.task.token_hash  # type: ignore[attr-defined]
    loss = Loss().measure([Subject(model, other)])[0]["loss"].details
    assert loss == {"protocol": found["protocol"], "token_hash": found["token_hash"]}


def test_the_attention_that_is_used_is_recorded() -> None:
    model = reader()
    model.network.set_attn_implementation("eager")  # type: ignore[operator]
    assert numerics(model).items() >= {"attention": "eager", "sdpa_kernels": None}.items()
    half = reader()
    half.network.bfloat16()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        found = numerics(half)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert found["dtype"] == found["compute_dtype"] == "bfloat16" and "flash" not in found["sdpa_kernels"]
    assert numerics(ADAPTERS["toy_images"]()[0])["attention"] is None


def test_a_perplexity_that_cannot_be_had_says_why() -> None:
    model, samples = causal("llama")
    none = measured(Perplexity(length=4), Subject(model, bundle_of(samples)))
    assert none.value is None and "holds no text" in str(none.reason)
    reads = reader()
    subject = Subject(reads, bundle(reads, TEXTS))
    assert "at most 64, the context" in str(measured(Perplexity(length=65), subject).reason)
    assert "evals.word_perplexity.max_length=65" in str(measured(WordPerplexity(max_length=65), subject).reason)
    short = Subject(reads, bundle(reads, ["abcdefgh"]))
    assert "must be from 2 to 9, all tokens" in str(measured(Perplexity(length=10), short).reason)
    assert "from 2 to" in str(measured(Perplexity(length=1), short).reason)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (" A two @-@ part , 1 @,@ 000 @.@ 5 . \n", " A two-part, 1,000.5.\n"),
        (' he said " yes " ( twice ) \n', ' he said "yes" (twice)\n'),
        (" = = Early life = = \n", " == Early life ==\n"),
        (" Boulter 's cat ; dogs ' food \n", " Boulter's cat; dogs' food\n"),
    ],
)
def test_spaces_around_marks_are_taken_back(raw: str, wanted: str) -> None:
    assert detokenized(raw) == wanted


def test_rows_come_back_from_the_joined_text_and_from_the_lines() -> None:
    rows = ["", " = One = \n", "", " text \n", " more \n", "", " = = Part = = \n", "", " = Two = \n", "", " x \n"]
    assert rows_of("\n\n".join(rows)) == rows
    assert rows_of("".join(row or " \n" for row in rows)) == rows
    first, second = pages_of(rows)
    assert first.raw.startswith(" = One = \n \n text \n more \n") and second.raw == " = Two = \n \n x "


@real
def test_wikitext2_pages_have_the_known_ratio_of_bytes_to_words() -> None:
    text = (DATA / "text/wikitext-2-raw/test.txt").read_text(encoding="utf-8")
    rows = rows_of(text)
    pages = pages_of(rows)
    assert "\n\n".join(rows) == text and len(rows) == 4358 and len(pages) == 62
    ratio = sum(len(p.raw.encode()) for p in pages) / sum(words_in(p.raw) for p in pages)
    assert ratio == pytest.approx(5.34745, abs=5e-6)


@real
@pytest.mark.parametrize(("name", "wanted"), [("llama_stories260k", 4.67), ("llama_baby", 2.22)])
def test_trained_models_are_as_good_as_stated(name: str, wanted: float) -> None:
    model = llama(checkpoint=str(DATA / name))
    tokenizer = model.preprocessing.tokenizer
    text = (DATA / "text/tinystories/validation.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()][:150]
    most = min(512, model.preprocessing.longest, model.network.config.max_position_embeddings) - 1  # type: ignore[union-attr, operator]
    read = tokenizer(stories, add_special_tokens=False)["input_ids"]
    first = [next(iter(rolling_windows(tokens, tokenizer.bos_token_id, most))) for tokens in read]
    first.sort(key=lambda window: len(window[0]))
    task, nats, count = LanguageModelling(len(tokenizer)), 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(first), 10):
            batch = padded(first[start : start + 10])
            nats += float(task.condensed(model.logits(batch), batch)[..., 0].double().sum())
            count += int((batch["targets"] != IGNORED).sum())
    assert math.exp(nats / count) == pytest.approx(wanted, abs=0.01)
