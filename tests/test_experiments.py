"""Every shipped experiment composes, checks, and runs with a small model on small data of its own kind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from main import run
from models.checkpoint import save_model
from models.llama import llama
from tests.conftest import CONFIGS, SMALL, Compose
from tests.mask2former_models import LEAST, SETTINGS
from tests.segmenters import write_cityscapes

NAMES = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "who", "made", "it", "anna", "did"]
UNTIMED = ("tiny_llama_wanda", "llama_wanda", "llama_sparsegpt", "llama_magnitude", "llama_benchmark",
           "tiny_llama_benchmark", "llama_width", "llama_depth", "llama_optin", "tiny_llama_width", "tiny_llama_depth",
           "tiny_llama_optin", "tiny_llama_pare")  # fmt: skip
FEW_BLOCKS = ("evals.throughput.batch=2", "evals.peak_memory.batch=2")
FEW = ("data.calibration_batch_size=4", "data.batch_size=4", "model.training.epochs=1")
TIMED = tuple(s for s in SMALL if s.startswith("evals."))


def pictures(folder: Path) -> tuple[str, ...]:
    """An ImageNet of two classes."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for wnid in ("n01440764", "n01443537"):
            (folder / split / wnid).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(folder / split / wnid / f"{number}.png")
    return (f"data.root={folder}", "data.workers=0", "model.pretrained=false", *FEW)


def cifar(folder: Path) -> tuple[str, ...]:
    """A CIFAR-10 of twelve images."""
    records = np.random.default_rng(0).integers(0, 255, (12, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(12) % 10
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(records.tobytes())
    return (f"data.root={folder}", "data.workers=0", "model.pretrained=false", *FEW)


def encoder(folder: Path) -> str:
    """A small BERT with a tokenizer, in transformers' format."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    words.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=160, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=20,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    return f"model.checkpoint={folder / 'bert'}"


def sentences(folder: Path) -> tuple[str, ...]:
    """An MNLI of eight pairs."""
    rows = [{"premise": "anna made a film", "hypothesis": "it did good", "label": i % 3} for i in range(8)]
    for split in ("train", "validation_matched"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return (f"data.root={folder}", "data.task=mnli", encoder(folder), *FEW)


def questions(folder: Path) -> tuple[str, ...]:
    """A SQuAD of eight questions."""
    asked = [
        {"id": str(i), "question": "who made it", "answers": [{"text": "anna", "answer_start": 0}]} for i in range(8)
    ]
    article = {"title": "film", "paragraphs": [{"context": "anna made a good film", "qas": asked}]}
    for split in ("train", "dev"):
        (folder / f"{split}-v1.1.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    lengths = ("data.max_tokens=40", "data.stride=4")
    return (f"data.root={folder}", encoder(folder), *lengths, *FEW)


SHORT = (
    "data.length=32", "data.calibration_length=16", "data.calibration_samples=8", "data.calibration_batch_size=4",
    "data.validation_samples=4",
)  # fmt: skip


def corpus(folder: Path) -> tuple[str, ...]:
    """A WikiText-2 and a C4 of a few sentences, and a small Llama that reads their bytes."""
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("\n\n".join(["= Film =", *["Anna made a good film . " * 8] * 9]))
    documents = "\n".join(json.dumps({"text": f"{i} who made a film, and did it well? " * 3}) for i in range(20))
    (folder / "train.jsonl").write_text(documents)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    save_model(llama(settings=sizes, tokenizer="byte"), folder / "llama")
    sources = (f"data.root={folder}", f"data.calibration.root={folder}", f"model.checkpoint={folder / 'llama'}")
    own = ("data.calibration.length=32", "data.calibration.calibration_length=16", "data.calibration.train_samples=4",
           "data.calibration.calibration_samples=8", "data.calibration.validation_samples=4")  # fmt: skip
    return (*sources, *SHORT, *own)


def text_alone(folder: Path) -> tuple[str, ...]:
    """The same without text to calibrate on."""
    return tuple(setting for setting in corpus(folder) if not setting.startswith("data.calibration."))


def manual(folder: Path) -> tuple[str, ...]:
    """Python's own manual, a little of it, and a small Llama."""
    sizes = "model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, max_position_embeddings: 64}"
    return (*SHORT, sizes, "data.train_samples=32", "model.training.epochs=1")


WRITING = (
    "evals.decode.batches=[1]", "evals.decode.prompt_tokens=8", "evals.decode.new_tokens=4",
    "evals.decode.seconds=0.05", "evals.energy.prompt_tokens=8", "evals.energy.new_tokens=4",
    "evals.energy.seconds=0.05", "evals.energy.idle_seconds=0.05", "evals.energy.blocks=1",
    "evals.generation.prompt_tokens=8", "evals.generation.new_tokens=8",
)  # fmt: skip
TINY_VIT = "model.settings={depth: 2, embed_dim: 24, num_heads: 4}"
LITTLE = "model.image_size=64"


def cifar_recovered(folder: Path) -> tuple[str, ...]:
    """The same, with one epoch of recovery a round."""
    few = ("recover.epochs=1", "prune.steps=2", "model.image_size=32", "data.calibration_batches=1")
    return (*cifar(folder), *few)


def streets(folder: Path) -> tuple[str, ...]:
    """A Cityscapes of five images."""
    write_cityscapes(folder, train=3, validation=2)
    few = ("data.calibration_batches=1", "data.batch_size=2", "model.name=null", "model.image_size=[32,64]")
    training = "model.training={_target_: utils.training.Training, epochs: 1}"
    return (f"data.root={folder}", "data.workers=0", f"model.settings={in_braces(SETTINGS | LEAST)}", training, *few)


def in_braces(values: object) -> str:
    """Plain values as the command line takes them."""
    if isinstance(values, dict):
        return "{" + ", ".join(f"{name}: {in_braces(inner)}" for name, inner in values.items()) + "}"
    return "[" + ", ".join(map(in_braces, values)) + "]" if isinstance(values, list) else str(values)


TINY_RESNET = "model.settings={layers: [1, 1, 1, 1], channels: [4, 4, 4, 4], stem_width: 4}"
TINY_SWIN = "model.settings={depths: [1, 2], embed_dim: 12, num_heads: [2, 3]}"
REAL: dict[str, tuple[Callable[[Path], tuple[str, ...]], tuple[str, ...]]] = {
    "deit_optin": (pictures, (TINY_VIT, LITTLE)),
    "deit_optin_beta": (pictures, (TINY_VIT, LITTLE)),
    "deit_tome": (pictures, (TINY_VIT, LITTLE)),
    "tiny_llama_wanda": (manual, ()),
    **{f"llama_{method}": (corpus, ()) for method in ("wanda", "sparsegpt", "magnitude", "depth", "optin")},
    "llama_width": (text_alone, ()),
    **{f"tiny_llama_{method}": (manual, ()) for method in ("width", "depth", "optin", "pare")},
    "llama_benchmark": (corpus, WRITING),
    "tiny_llama_benchmark": (manual, WRITING),
    "resnet_optin": (pictures, (TINY_RESNET, "prune.ratio=0.01")),
    "swin_optin": (pictures, (TINY_SWIN, "model.image_size=56")),
    "mask2former_optin": (streets, ()),
    "cifar_optin": (cifar, (TINY_VIT, LITTLE)),
    "vit_cifar10": (cifar_recovered, (TINY_VIT,)),
    "vit_sensitivity": (pictures, (TINY_VIT, LITTLE, "prune.grid=[0.5]", "data.calibration_batches=1")),
    "bert_optin": (sentences, ()),
    "bert_kwon": (sentences, ("data.calibration_batches=2",)),
    "deit_kwon": (pictures, (TINY_VIT, LITTLE, "data.calibration_batches=2")),
    "deit_pare": (pictures, (TINY_VIT, LITTLE, "data.calibration_batches=2", "data.calibration_batch_size=4")),
    "squad_optin": (questions, ()),
}
TOY_DATA = {
    "random_tokens": (
        "data.train_samples=64",
        "data.validation_samples=32",
        "data.calibration_batch_size=8",
        "data.tokens=6",
    ),
    "signal_tokens": (
        "data.train_samples=64",
        "data.validation_samples=32",
        "data.calibration_batch_size=8",
        "data.tokens=12",
        "data.token_width=16",
    ),
}
# the first has no ratio, and an encoder of its own: tests/test_ancestor.py runs it small; the second removes nothing:
# tests/test_self_test.py does
ELSEWHERE = ("toy_tokens_ancestor", "self_test")


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_its_command(name: str) -> None:
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    commands = (f"# @package _global_\n# python main.py {sweep}+experiment={name}" for sweep in ("", "-m "))
    assert text.startswith(tuple(commands))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in REAL and n not in ELSEWHERE])
def test_it_runs_small(name: str, small_config: Compose, tmp_path: Path) -> None:
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    small = next((s for data, s in TOY_DATA.items() if f"/data: {data}" in text), ())
    training = ["recover.epochs=1"] if "/recover: " in text and "/recover: none" not in text else []
    record = run(small_config(f"+experiment={name}", *small, *training, "prune.ratio=0.1"), tmp_path)
    assert record.status == "ok" and record.name == name and record.plan and not record.plan.is_identity


@pytest.mark.parametrize("name", REAL)
def test_it_runs_small_on_data_of_its_kind(name: str, composed: Compose, tmp_path: Path) -> None:
    make, more = REAL[name]
    (tmp_path / "data").mkdir()
    given = (
        f"storage={tmp_path}/storage",
        "prune.ratio=0.05",
        *(s for s in (*TIMED, *FEW_BLOCKS) if name not in UNTIMED),
    )
    record = run(composed(f"+experiment={name}", *make(tmp_path / "data"), *given, *more), tmp_path / "out")
    assert record.status == "ok" and record.name == name and record.plan and not record.plan.is_identity
    assert next(iter(record.pruned.values())).value is not None
