"""Real families: what they refuse by name, weights in every format, and folders that stock libraries load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from models import load
from models.base import Batch, PrunableModel
from models.bert import NOT_COVERED, bert
from models.checkpoint import how_to_load, save_model
from models.resnet import resnet
from models.vit import vit
from prune.base import Plan
from prune.surgery import cut
from tests.adapters import ADAPTERS
from tests.test_cli import ROOT
from tests.test_contract import logits, random_plan
from utils.errors import InputError
from utils.training import Training

FAMILIES = [
    "deit",
    "deit_distilled",
    "vit_swiglu",
    "resnet_basic",
    "resnet_bottleneck",
    "bert",
    "distilbert",
    "roberta",
    "llama",
    "qwen3",
]
TINY_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
TINY_BERT = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "max_position_embeddings": 24,
}  # fmt: skip


def uniform_neurons(model: PrunableModel, keep: int) -> PrunableModel:
    """The same number of neurons in every layer, not the first ones, and all heads."""
    return cut(
        model, Plan.of(model, {g.name: torch.arange(keep) + 1 for g in model.unit_groups() if g.kind == "neuron"})
    )


def inputs(samples: Batch) -> Batch:
    return {name: tensor for name, tensor in samples.items() if name != "labels"}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_reloads_bit_equal(family: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[family]()
    for number, plan in enumerate((random_plan(model, 3), random_plan(model, 0, keep=0.0), Plan.of(model, {}))):
        pruned = cut(model, plan)
        folder = save_model(pruned, tmp_path / str(number))
        network = load(folder)
        with torch.inference_mode():
            given = network(**inputs(samples)) if "input_ids" in samples else network(samples["inputs"])
        found = given if isinstance(given, Tensor) else given.logits
        assert torch.equal(found, logits(pruned, samples))
        assert not network.training


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_transformers_loads_uniform_neurons(family: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[family]()
    pruned = uniform_neurons(model, 7)
    folder = save_model(pruned, tmp_path / "model")
    assert "own library" in how_to_load(folder)
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(stock) is type(model.network)
    with torch.inference_mode():
        assert torch.equal(stock(**inputs(samples)).logits, logits(pruned, samples))


@pytest.mark.parametrize("family", ["deit", "deit_distilled", "vit_qk_norm"])
@pytest.mark.parametrize("keep", [1, 7, 23])
def test_timm_loads_uniform_neurons(family: str, keep: int, tmp_path: Path) -> None:
    model, samples = ADAPTERS[family]()
    pruned = uniform_neurons(model, keep)
    folder = save_model(pruned, tmp_path / "model")
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(stock(samples["inputs"]), logits(pruned, samples))


@pytest.mark.parametrize("family", ["deit", "bert", "resnet_basic"])
def test_a_cut_that_stock_cannot_say_says_why(family: str, tmp_path: Path) -> None:
    model, _ = ADAPTERS[family]()
    folder = save_model(cut(model, random_plan(model, 1)), tmp_path / "model")
    line = how_to_load(folder)
    assert "models.load alone: " in line and "\n" not in line
    assert not (folder / "config.json").is_file()


def test_uneven_neurons_name_their_widths(tmp_path: Path) -> None:
    model, _ = ADAPTERS["bert"]()
    first, second = (g.name for g in model.unit_groups() if g.kind == "neuron")
    uneven = cut(model, Plan.of(model, {first: torch.arange(5), second: torch.arange(9)}))
    assert "here they are 5, 9" in how_to_load(save_model(uneven, tmp_path / "model"))


def test_a_saved_vit_is_a_checkpoint_again(tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    pruned = cut(model, random_plan(model, 1))
    folder = save_model(pruned, tmp_path / "model")
    again = vit(name="deit_tiny_patch16_224", classes=7, checkpoint=str(folder))
    assert again.has_weights and torch.equal(logits(again, samples), logits(pruned, samples))
    twice = cut(again, random_plan(again, 2))
    assert all(torch.isin(units, pruned.origin[name]).all() for name, units in twice.origin.items())


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_torch_files_are_read_without_running_them(wrapper: str | None, tmp_path: Path) -> None:
    model, samples = ADAPTERS["deit"]()
    tensors = {f"module.{name}": tensor for name, tensor in model.network.state_dict().items()}
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "weights.pth")
    settings = model.recipe.arguments["settings"]
    found = vit(name="deit_tiny_patch16_224", classes=7, image_size=16, settings=settings,
                checkpoint=str(tmp_path / "weights.pth"))  # fmt: skip
    assert torch.equal(logits(found, samples), logits(model, samples))


def test_a_torch_file_with_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="only weights are read"):
        vit(name="deit_tiny_patch16_224", checkpoint=str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.qkv.weight": torch.zeros(3, 24)}, r"'blocks.0.attn.qkv.weight'.*\(3, 24\).*\(72, 24\)"),
        ({"blocks.0.attn.qkv.weight": None}, r"'blocks.0.attn.qkv.weight': the file has nothing"),
        ({"blocks.7.extra": torch.zeros(2)}, r"'blocks.7.extra': the file has \(2,\), the model nothing"),
    ],
)
def test_a_misfit_names_the_first_difference(change: dict, message: str, tmp_path: Path) -> None:
    model, _ = ADAPTERS["deit"]()
    tensors = {n: t for n, t in (dict(model.network.state_dict()) | change).items() if t is not None}
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=message):
        vit(name="deit_tiny_patch16_224", classes=7, image_size=16, settings=model.recipe.arguments["settings"],
            checkpoint=str(tmp_path / "weights.safetensors"))  # fmt: skip


def test_a_new_head_keeps_the_body(tmp_path: Path) -> None:
    model, _ = ADAPTERS["deit_distilled"]()
    save_file(dict(model.network.state_dict()), tmp_path / "weights.safetensors")
    common = {
        "name": "deit_tiny_distilled_patch16_224",
        "image_size": 16,
        "settings": model.recipe.arguments["settings"],
        "checkpoint": str(tmp_path / "weights.safetensors"),
    }
    with pytest.raises(InputError, match=r"'head.weight': the file has \(7, 24\), the model \(3, 24\)"):
        vit(classes=3, **common)
    found = vit(classes=3, new_head=True, **common)
    assert not found.has_weights
    differing = {n for n, t in found.network.state_dict().items() if not torch.equal(t, model.network.state_dict()[n])}
    assert differing == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_transformers_folder_without_its_head_needs_training(tmp_path: Path) -> None:
    model, samples = ADAPTERS["bert"]()
    model.network.bert.save_pretrained(tmp_path / "body")  # type: ignore[union-attr,operator]
    found = bert(checkpoint=str(tmp_path / "body"), classes=3)
    assert not found.has_weights
    body = model.network.bert.state_dict()  # type: ignore[union-attr,operator]
    assert all(torch.equal(t, body[n]) for n, t in found.network.bert.state_dict().items())  # type: ignore[union-attr,operator]
    assert logits(found, samples).shape == (6, 3)


def test_a_transformers_folder_with_another_head_is_refused_or_renewed(tmp_path: Path) -> None:
    model, _ = ADAPTERS["bert"]()
    model.network.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with pytest.raises(InputError, match="7 labels, the data has 3; model.new_head=true"):
        bert(checkpoint=str(tmp_path / "model"), classes=3)
    found = bert(checkpoint=str(tmp_path / "model"), classes=3, new_head=True)
    assert not found.has_weights and found.network.classifier.weight.shape == (3, 24)  # type: ignore[union-attr]
    renewed = bert(checkpoint=str(tmp_path / "model"), classes=7, new_head=True)
    assert not torch.equal(renewed.network.classifier.weight, model.network.classifier.weight)  # type: ignore[union-attr,arg-type]
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(renewed.network.get_parameter(query), model.network.get_parameter(query))


def test_a_damaged_transformers_folder_is_named(tmp_path: Path) -> None:
    model, _ = ADAPTERS["bert"]()
    model.network.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="model.checkpoint=.*cannot be loaded"):
        bert(checkpoint=str(tmp_path / "model"), classes=7)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(InputError, match="model.checkpoint="):
        bert(checkpoint=str(tmp_path / "model"), classes=7)


@pytest.mark.parametrize("kind", ["albert", "mpnet", "deberta-v2"])
def test_an_encoder_that_cannot_be_cut_says_why(kind: str) -> None:
    with pytest.raises(InputError, match=f"layout of {kind} cannot be cut exactly: {NOT_COVERED[kind]}"):
        bert(classes=3, settings={"model_type": kind, **TINY_BERT})


def test_a_decoder_is_no_encoder() -> None:
    with pytest.raises(InputError, match="configured as a decoder"):
        bert(classes=3, settings={"model_type": "bert", "is_decoder": True, **TINY_BERT})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("deit_tiny_patch16_224", {**TINY_VIT, "scale_attn_norm": True}, "block 0 .*scale_attn_norm"),
        ("deit_tiny_patch16_224", {**TINY_VIT, "scale_mlp_norm": True}, "block 0 .*scale_mlp_norm"),
        ("vit_base_patch16_224", {**TINY_VIT, "block_fn": "parallel"}, "ParallelScalingBlock|cannot build"),
        ("resnet18", {}, "is a ResNet; model=vit takes"),
        ("deit_tinny_patch16_224", {}, "did you mean deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", {"embed_dim": 23, "num_heads": 4}, "cannot build it with embed_dim=23"),
    ],
)
def test_a_vision_transformer_that_cannot_be_cut_says_why(name: str, settings: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        vit(name=name, settings=settings)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnext50_32x4d", "layer1.0 .*grouped convolution"),
        ("resnetblur18", "layer2.0 .*anti-aliasing"),
        ("deit_tiny_patch16_224", "is a VisionTransformer; model=resnet takes"),
    ],
)
def test_a_residual_network_that_cannot_be_cut_says_why(name: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        resnet(name=name)


def test_offline_hub_names_say_what_is_missing_and_what_to_give() -> None:
    with pytest.raises(
        InputError, match="model.name=bert-base-uncased: is not on this machine.*model.checkpoint=<folder>"
    ):
        bert(name="bert-base-uncased", classes=2)
    with pytest.raises(InputError, match="model.name=deit_tiny_patch16_224.*model.checkpoint="):
        vit(name="deit_tiny_patch16_224", pretrained=True)


def test_only_builders_of_this_package_are_called_on_a_files_word(tmp_path: Path) -> None:
    model, _ = ADAPTERS["deit"]()
    folder = save_model(model, tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"builder": "os.system", "arguments": {"command": "x"}})
    )
    with pytest.raises(InputError, match="os.system"):
        load(folder)


def in_hub_cache(home: Path, repository: str) -> Path:
    """A folder where the hub's client keeps a downloaded repository."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abc")
    (root / "snapshots" / "0123abc").mkdir(parents=True)
    return root / "snapshots" / "0123abc"


FROM_CACHE = """
import torch
from models.bert import bert
from models.vit import vit
encoder = bert(name="someone/small-bert", classes=7)
assert encoder.has_weights and encoder.name == "small-bert", encoder.name
assert encoder.preprocessing.tokenizer("b a")["input_ids"] == [4, 3], encoder.preprocessing.tokenizer("b a")
images = vit(name="deit_tiny_patch16_224", classes=1000, pretrained=True)
assert images.has_weights
torch.save((encoder.network.state_dict(), images.network.state_dict()), "found.pt")
"""


def test_what_the_hub_gave_once_is_found_without_network(tmp_path: Path) -> None:
    encoder, _ = ADAPTERS["bert"]()
    folder = in_hub_cache(tmp_path, "someone/small-bert")
    encoder.network.save_pretrained(folder)  # type: ignore[operator]
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)
    images = timm.create_model("deit_tiny_patch16_224")
    repository = str(dict(images.pretrained_cfg)["hf_hub_id"])  # type: ignore[call-overload]
    save_file(images.state_dict(), in_hub_cache(tmp_path, repository) / "model.safetensors")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FROM_CACHE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for found, given in zip(torch.load(tmp_path / "found.pt"), (encoder.network, images), strict=True):
        assert all(torch.equal(found[name], tensor) for name, tensor in given.state_dict().items())


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model, _ = ADAPTERS["deit"]()
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(InputError, match="saved from model.name=deit_tiny_patch16_224, asked is deit_small"):
        vit(name="deit_small_patch16_224", checkpoint=str(folder))


def test_a_saved_bert_can_get_a_new_head(tmp_path: Path) -> None:
    model, samples = ADAPTERS["bert"]()
    pruned = cut(model, random_plan(model, 1))
    folder = save_model(pruned, tmp_path / "model")
    with pytest.raises(InputError, match="saved with classes=7, asked is 1; model.new_head=true"):
        bert(checkpoint=str(folder), classes=1)
    for head, classes, shape in (("classification", 1, (6, 1)), ("question_answering", None, (6, 9, 2))):
        found = bert(checkpoint=str(folder), head=head, classes=classes, new_head=True, training=Training())  # type: ignore[arg-type]
        assert logits(found, samples).shape == shape and not found.has_weights and found.notes
        body = "bert.encoder.layer.1.output.dense.weight"
        assert torch.equal(found.network.get_parameter(body), pruned.network.get_parameter(body))


def test_a_regression_head_on_a_classifier_can_be_saved_as_stock(tmp_path: Path) -> None:
    model, _ = ADAPTERS["bert"]()
    model.network.config.problem_type = "single_label_classification"  # type: ignore[union-attr]
    model.network.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    found = bert(checkpoint=str(tmp_path / "model"), classes=1, new_head=True)
    assert "own library" in how_to_load(save_model(uniform_neurons(found, 5), tmp_path / "saved"))


def test_a_stock_writer_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = ADAPTERS["bert"]()

    def fail(folder: Path) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(model, "stock_files", fail)
    folder = save_model(model, tmp_path / "model")
    assert "refused to write its configuration: no room" in how_to_load(folder) and load(folder) is not None


@pytest.mark.parametrize("name", ["empty.pth", "text.pth", "empty.safetensors"])
def test_files_that_hold_no_weights_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("" if name.startswith("empty") else "hello")
    with pytest.raises(InputError, match=f"{name} is damaged"):
        vit(name="deit_tiny_patch16_224", checkpoint=str(tmp_path / name))
