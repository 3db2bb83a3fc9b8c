"""Llama and its kin: what is cut, what stock transformers loads, what is refused, and that every method runs on it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evals.macs import counted_macs
from main import run
from models import load
from models.base import Batch, PrunableModel
from models.checkpoint import how_to_load, save_model
from models.cost import cost_model
from models.llama import NOT_COVERED, Llama, llama
from prune.base import Plan
from prune.optin.exact import exact_losses
from prune.optin.teacher import Settings
from prune.recovery.finetune import Finetune
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of, causal
from tests.conftest import Compose
from tests.modules import stirred
from tests.test_contract import logits, random_plan
from utils.errors import InputError
from utils.storage import Store

DATA = Path(os.environ.get("PARE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (PARE_DATA)")
KINDS = ["llama", "llama_plain", "mistral", "qwen2", "qwen3"]
TINY = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": 24,
}  # fmt: skip
FEW = ("data.calibration_samples=8", "data.calibration_batch_size=4", "data.validation_samples=4")


def uniform(model: PrunableModel, heads: list[int], neurons: list[int]) -> PrunableModel:
    """The same units of every layer."""
    kept = {g.name: torch.tensor(heads if g.kind == "head" else neurons) for g in model.unit_groups()}
    return cut(model, Plan.of(model, kept))


def stock_logits(folder: Path, samples: Batch) -> torch.Tensor:
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return stock(**samples).logits


def bytes_reader(**settings: object) -> Llama:
    """A random model that reads bytes."""
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = llama(settings={**sizes, **settings}, tokenizer="byte")
    stirred(model.network)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_stock_transformers(kind: str) -> None:
    model, samples = ADAPTERS[kind]()
    with torch.inference_mode():
        assert torch.equal(model.network(**samples).logits, logits(model, samples))
        alone = {"input_ids": samples["input_ids"]}
        assert torch.equal(model.network(**alone).logits, logits(model, alone))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kv_group_is_a_key_head_with_its_query_heads(kind: str) -> None:
    """A group's query heads read its keys alone: with other keys gone, they answer as before."""
    model, samples = ADAPTERS[kind]()
    heads, width = model.unit_groups()[0], model.network.get_submodule("model.layers.0.self_attn").head_dim
    assert (heads.kind, heads.count, heads.width) == ("head", 3, 2 * int(width))  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    reader = model.network.get_submodule(heads.consumer.module)
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, samples)
    with torch.no_grad():
        for part in heads.producers:
            if "k_proj" in part.tensor or "v_proj" in part.tensor:
                model.network.get_parameter(part.tensor)[part.index[[0, 2]].flatten()] += 1.0
    logits(model, samples)
    handle.remove()
    before, after = (x[..., heads.consumer.index[1]] for x in seen)
    assert torch.equal(before, after) and not torch.equal(*seen)


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_reloads_bit_equal(kind: str, tmp_path: Path) -> None:
    model, samples = ADAPTERS[kind]()
    for number, plan in enumerate((random_plan(model, 3), random_plan(model, 0, keep=0.0), Plan.of(model, {}))):
        pruned = cut(model, plan)
        folder = save_model(pruned, tmp_path / str(number))
        with torch.inference_mode():
            assert torch.equal(load(folder)(**samples).logits, logits(pruned, samples))
        again = llama(checkpoint=str(folder))
        assert torch.equal(logits(again, samples), logits(pruned, samples)) and again.has_weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [[0, 1, 2], [0, 2], [1]])
def test_stock_transformers_loads_uniform_cuts(kind: str, heads: list[int], tmp_path: Path) -> None:
    model, samples = ADAPTERS[kind]()
    pruned = uniform(model, heads, [1, 2, 5, 7, 11, 12, 13, 19])
    folder = save_model(pruned, tmp_path / "model")
    assert json.loads((folder / "manifest.json").read_text())["not_stock"] is None
    assert torch.equal(stock_logits(folder, samples), logits(pruned, samples))
    assert not torch.equal(logits(pruned, samples), logits(model, samples))


@pytest.mark.parametrize(
    ("heads", "neurons", "why"),
    [([], [0], "one number of KV groups for all layers, above 0; here they are 0"), ([0], [], "number of neurons")],
)
def test_what_stock_cannot_say_has_a_reason(heads: list[int], neurons: list[int], why: str, tmp_path: Path) -> None:
    model, samples = causal("llama")
    pruned = uniform(model, heads, neurons)
    folder = save_model(pruned, tmp_path / "model")
    assert why in how_to_load(folder) and not (folder / "config.json").is_file()
    assert torch.equal(load(folder)(**samples).logits, logits(pruned, samples))


def test_heads_that_do_not_divide_the_width_are_said_so(tmp_path: Path) -> None:
    model, samples = causal("llama", num_attention_heads=6, num_key_value_heads=6)
    pruned = uniform(model, [0, 1, 2, 3, 4], [0, 1])
    folder = save_model(pruned, tmp_path / "model")
    assert "refuses 5 heads" in how_to_load(folder) and "multiple of the number of attention heads" in how_to_load(
        folder
    )
    assert torch.equal(load(folder)(**samples).logits, logits(pruned, samples))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, samples = causal("llama", tie_word_embeddings=True)
    pruned = uniform(model, [0, 1], [3, 4])
    again = llama(checkpoint=str(save_model(pruned, tmp_path / "model")))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for network in (pruned.network, again.network, stock):
        assert network.get_parameter("lm_head.weight") is network.get_parameter("model.embed_tokens.weight")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_macs_count_every_pair_of_tokens(kind: str) -> None:
    model, samples = causal(kind, tie_word_embeddings=True)
    example = {name: tensor[:1] for name, tensor in samples.items()}
    costs = cost_model(model, example)
    assert costs.total("macs") == counted_macs(model, example)
    assert costs.total("params") == sum(parameter.numel() for parameter in model.network.parameters())


def test_positions_keep_their_precision_in_bfloat16() -> None:
    model = bytes_reader(max_position_embeddings=512)
    rotary = model.network.get_submodule("model.rotary_emb")
    exact = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    model.network.to(torch.bfloat16)
    model.network.to("cpu")
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(buffer, exact[name]) for name, buffer in rotary.named_buffers())
    assert all(buffer.bfloat16().float().ne(buffer).any() for buffer in exact.values()), "or rounding would not show"
    twin = model.copy()
    batch = {"input_ids": torch.arange(60)[None]}
    assert torch.equal(logits(twin, batch), logits(model, batch))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_optin_is_as_masking_each_unit_by_itself(kind: str) -> None:
    """Divergence of the logits summed over real tokens, unit by unit, against whole forward passes."""
    model, samples = ADAPTERS[kind]()
    data = bundle_of(samples, batches=1)
    found = exact_losses(model, data, Settings(temperature=1.0))["kd"]
    dense, real_ones = logits(model, samples).double().log_softmax(-1), samples["attention_mask"].bool()
    for group in model.unit_groups():
        for unit in range(group.count):
            others = torch.tensor([u for u in range(group.count) if u != unit])
            with masked(model, Plan.of(model, {group.name: others})):
                given = logits(model, samples).double().log_softmax(-1)
            divergence = (dense.exp() * (dense - given)).sum(-1)[real_ones].sum()
            assert float(found[group.name][unit]) == pytest.approx(float(divergence), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["fisher", "taylor", "magnitude", "optin"])
def test_methods_run_from_the_command_line(method: str, composed: Compose, tmp_path: Path) -> None:
    sizes = "model.settings={hidden_size: 24, intermediate_size: 20, num_hidden_layers: 2, num_attention_heads: 4,"
    small = f"{sizes} num_key_value_heads: 2, max_position_embeddings: 64}}"
    given = ("model=tiny_llama", small, "model.training.epochs=1", "data=pydoc", "data.length=32", *FEW)
    lengths = ("data.calibration_length=32", "data.train_samples=20", "evals=[quality,loss,perplexity,macs,params]")
    record = run(composed(*given, *lengths, f"prune={method}", "prune.ratio=0.3", f"storage={tmp_path}/s"), tmp_path)
    assert record.status == "ok" and record.plan and 0.3 <= record.plan.ratio_reached < 0.35
    assert record.pruned["perplexity"].value != record.dense["perplexity"].value
    assert record.dense["perplexity"].details["chunks"] == 4 and record.pruned["macs"].details["tokens"] == 32
    assert record.dense["token_perplexity"].value == pytest.approx(record.dense["perplexity"].value)


@pytest.mark.parametrize("kind", ["olmo2", "mixtral", "phi3", "gpt2"])
def test_a_model_that_cannot_be_cut_says_why(kind: str) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 8, "pad_token_id": 0}  # fmt: skip
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(InputError, match=f"layout of {kind} cannot be cut exactly: {NOT_COVERED[kind]}"):
        llama(settings={"model_type": kind, **sizes})


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give model.checkpoint=<folder>, model.name=<hub name>, or model.settings"):
        llama()
    with pytest.raises(InputError, match="cannot build a causal llama from them: .*multiple of the number"):
        llama(settings={**TINY, "num_attention_heads": 5})
    with pytest.raises(InputError, match="model.name=meta-llama/Llama-3.2-1B: is not on this machine"):
        llama(name="meta-llama/Llama-3.2-1B")
    with pytest.raises(InputError, match="model.checkpoint=.*cannot be loaded by transformers"):
        (tmp_path / "empty").mkdir()
        llama(checkpoint=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="token ids up to 257, the embedding 100 rows"):
        bytes_reader(vocab_size=100)


def transformers_folder(folder: Path, shard: str = "50GB") -> Llama:
    """A folder as transformers writes it."""
    model = bytes_reader()
    model.network.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    model.preprocessing.tokenizer.save_pretrained(folder)
    return model


def test_a_folder_of_transformers_is_a_checkpoint(tmp_path: Path) -> None:
    model = transformers_folder(tmp_path / "small", shard="8KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    found = llama(checkpoint=str(tmp_path / "small"))
    batch = {"input_ids": torch.arange(40)[None]}
    assert torch.equal(logits(found, batch), logits(model, batch)) and found.name == "small" and found.has_weights
    assert found.preprocessing.longest == 64 and found.preprocessing.tokenizer("a")["input_ids"][0] == 256
    assert str(tmp_path) not in json.dumps(found.recipe.arguments)


def test_how_it_is_to_be_asked_for_text_stays_with_it(tmp_path: Path) -> None:
    """Odd values too, which transformers reads and refuses to write: a temperature beside greedy decoding."""
    transformers_folder(tmp_path / "talks")
    odd = {"eos_token_id": [257, 3], "temperature": 0.3, "do_sample": False, "max_length": 7}
    (tmp_path / "talks/generation_config.json").write_text(json.dumps(odd))
    model = llama(checkpoint=str(tmp_path / "talks"))
    for number in range(2):  # the second time from a folder of ours
        save_model(cut(model, Plan.of(model, {})), tmp_path / f"saved{number}")
        found = GenerationConfig.from_pretrained(tmp_path / f"saved{number}")
        assert {name: getattr(found, name) for name in odd} == odd
        model = llama(checkpoint=str(tmp_path / f"saved{number}"))
    for damaged in ("[1]", '{"max_new_tokens": -1}', "{"):
        (tmp_path / "saved1/generation_config.json").write_text(damaged)
        with pytest.raises(InputError, match="model.checkpoint=.*saved1: generation_config.json cannot be read: "):
            llama(checkpoint=str(tmp_path / "saved1"))
    save_model(bytes_reader(), tmp_path / "silent")
    assert not (tmp_path / "silent/generation_config.json").exists(), "its configuration says all there is"


def test_a_missing_shard_and_a_missing_weight_are_named(tmp_path: Path) -> None:
    transformers_folder(tmp_path / "shards", shard="8KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="model.checkpoint=.*shards: must hold all 6 files.*missing: model-00002-of"):
        llama(checkpoint=str(tmp_path / "shards"))
    transformers_folder(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="'model.layers.1.mlp.up_proj.weight': the file has nothing"):
        llama(checkpoint=str(tmp_path / "whole"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, _ = causal("llama")
    model.network.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    bytes_reader().preprocessing.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="model.checkpoint=.*token ids up to 257, the embedding 50 rows"):
        llama(checkpoint=str(tmp_path / "model"))


@real
@pytest.mark.parametrize("name", ["llama_stories260k", "llama_baby"])
def test_a_trained_model_is_cut_and_loads_as_stock(name: str, tmp_path: Path) -> None:
    model = llama(checkpoint=str(DATA / name))
    pruned = uniform(model, [0, 3], list(range(5, 100)))
    folder = save_model(pruned, tmp_path / "model")
    read = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    samples = {"input_ids": read["input_ids"]}
    assert torch.equal(stock_logits(folder, samples), logits(pruned, samples))
    shutil.rmtree(folder)


def test_tied_embeddings_train_over_epochs_and_stay_tied(tmp_path: Path) -> None:
    """What is kept between epochs is one file, in which no two tensors may share memory."""
    model, samples = causal("llama", tie_word_embeddings=True)
    done = Finetune(epochs=2).recover(cut(model, random_plan(model, 0)), model, bundle_of(samples), Store(tmp_path), 0)
    head, read = (done.model.network.get_parameter(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head is read and not torch.equal(head, model.network.get_parameter("lm_head.weight"))
