"""Keys of `model.settings`: a misspelt one is refused with what was meant, and none is passed over."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from models.bert import bert
from models.checkpoint import save_model
from models.llama import llama
from models.mask2former import mask2former
from models.settings import COMMON, known_settings, refuse_unknown_settings
from models.swin import swin
from models.vit import vit
from utils.errors import InputError

TINY = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SMALL_BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A stock folder without a manifest."""
    model = llama(settings=TINY)
    model.network.save_pretrained(tmp_path / "stock")  # type: ignore[operator]
    return str(tmp_path / "stock")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_misspelt_key_of_a_causal_model_is_refused(kind: str) -> None:
    message = f"model.settings.hiden_size=24: the configuration of {kind} has no 'hiden_size'; did you mean 'hidden_s"
    with pytest.raises(InputError, match=message):
        llama(settings={**TINY, "model_type": kind, "hiden_size": 24})


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
def test_a_misspelt_key_of_an_encoder_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"of {kind} has no 'max_positions'; did you mean 'max_position_embeddings'"):
        bert(settings={"model_type": kind, "max_positions": 64}, classes=2)


def test_inner_configurations_are_looked_at_too() -> None:
    with pytest.raises(InputError, match=r"model.settings.num_querys=4: .* did you mean 'num_queries'"):
        mask2former(settings={"num_querys": 4}, classes=2)
    backbone = {"model_type": "swin", "embed_dims": 8}
    with pytest.raises(InputError, match=r"settings.backbone_config.embed_dims=8: .*swin has no .*mean 'embed_dim'"):
        mask2former(settings={"backbone_config": backbone}, classes=2)
    with pytest.raises(InputError, match=r"settings.rope_parameters.facto=2.0: rotary embeddings have no 'facto'; did"):
        llama(settings={**TINY, "rope_parameters": {"rope_type": "linear", "facto": 2.0}})


@pytest.mark.parametrize(
    "build, name", [(vit, "deit_tiny_patch16_224"), (swin, "swin_tiny_patch4_window7_224")], ids=["vit", "swin"]
)
def test_timm_refuses_by_itself(build: Any, name: str) -> None:
    with pytest.raises(InputError, match="unexpected keyword argument 'embed_dims'"):
        build(name=name, settings={"embed_dims": 24})


def test_keys_that_are_no_fields_but_count_stay_allowed() -> None:
    given = {"rope_theta": 77.0, "attn_implementation": "eager", "num_labels": 3}
    config: Any = llama(settings={**TINY, **given}).network.config
    assert config.rope_parameters["rope_theta"] == 77.0 and config._attn_implementation == "eager"
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    assert llama(settings={**TINY, "rope_parameters": scaled}).network.config.rope_parameters == scaled  # type: ignore[union-attr]
    refuse_unknown_settings({"hidden_size": 8, "n_heads": 2}, "distilbert")  # its own name, and the usual one
    refuse_unknown_settings({"anything": 1}, "no_such_kind")  # transformers says what kinds there are


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "distilbert", "swin"])
def test_every_known_name_reaches_the_configuration(kind: str) -> None:
    config: Any = CONFIG_MAPPING[kind]()
    assert all(hasattr(config, name) for name in known_settings(type(config)) - {*COMMON})
    assert "hidden_size" in known_settings(type(config)) or kind == "swin"


def test_what_the_network_asks_for_counts_without_being_a_field() -> None:
    network = llama(settings={**TINY, "model_type": "qwen2", "head_dim": 6}).network
    assert network.get_submodule("model.layers.0.self_attn.k_proj").out_features == 6


def test_on_top_of_a_folder(folder: str) -> None:
    changed: Any = llama(checkpoint=folder, settings={"rms_norm_eps": 0.5}).network.config
    assert changed.rms_norm_eps == 0.5 and changed.intermediate_size == 12
    with pytest.raises(InputError, match="model.settings.rms_norm=0.5: .* did you mean 'rms_norm_eps'"):
        llama(checkpoint=folder, settings={"rms_norm": 0.5})
    with pytest.raises(
        InputError, match="model.settings.rope_theta=5.0: would be passed over .*; give rope_parameters"
    ):
        llama(checkpoint=folder, settings={"rope_theta": 5.0})  # transformers would pass it over
    with pytest.raises(InputError, match=f"model.settings.model_type=bert: {folder} holds a llama; leave it out"):
        llama(checkpoint=folder, settings={"model_type": "bert"})
    llama(checkpoint=folder, settings={"model_type": "llama"})


@pytest.mark.parametrize("build, settings", [(llama, TINY), (bert, SMALL_BERT)], ids=["llama", "bert"])
def test_a_saved_model_keeps_its_own(build: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    heads: dict[str, Any] = {} if build is llama else {"classes": 2}
    save_model(build(settings=settings, **heads), tmp_path / "saved")
    checkpoint = str(tmp_path / "saved")
    assert build(settings=settings, checkpoint=checkpoint, **heads).network.config.hidden_size == 16
    with pytest.raises(InputError, match="model.settings.hidden_size=32: model.checkpoint=.* was saved with hidden_s"):
        build(settings={"hidden_size": 32}, checkpoint=checkpoint, **heads)
    with pytest.raises(InputError, match="model.settings.hiden_size=16: model.checkpoint=.* was saved without it"):
        build(settings={"hiden_size": 16}, checkpoint=checkpoint, **heads)
