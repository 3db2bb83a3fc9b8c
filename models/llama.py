"""Llama and its kin from transformers: causal language models with gated MLPs and shared key and value heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from models.base import Attribute, Batch, Consumer, Emptied, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.byte_tokenizer import byte_tokenizer
from models.checkpoint import MANIFEST, load_weights, stored_recipe
from models.depth import shorten_transformer
from models.hf import (
    build_causal,
    causal_network,
    config_of,
    load_tokenizer,
    plain_config,
    read_generation_defaults,
    refuse_larger_vocabulary,
    text_preprocessing,
    write_generation_defaults,
    write_stock,
)
from models.recast import recast
from models.settings import refuse_unknown_settings
from utils.errors import InputError
from utils.rules import ExistingPath, checked
from utils.training import Training

COVERED = ("llama", "mistral", "qwen2", "qwen3")
NOT_COVERED = {
    "olmo2": "its norms of queries and keys run over all heads, so that one head's leaving changes the others",
    "olmo3": "its norms of queries and keys run over all heads, so that one head's leaving changes the others",
    "gemma2": "its attention caps logits, which sdpa can't, and it norms what the consumers give",
    "gemma3_text": "it norms what the consumers give",
    "phi3": "its projections are fused into one weight each",
    "mixtral": "its neurons lie in experts that a router chooses",
    "qwen2_moe": "its neurons lie in experts that a router chooses",
    "qwen3_moe": "its neurons lie in experts that a router chooses",
    "llama4_text": "its neurons lie in experts that a router chooses",
    "gpt2": "its projections are fused and stored transposed",
    "opt": "its positions are learned, and its neurons have no gate",
}


class NoHeads(nn.Module):
    """Stands in for an attention without heads, whose own reshape cannot run on nothing.

    Keeps the (empty) projections under their names, for checkpoints, and adds the output's bias.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.head_dim, self.num_key_value_groups = attention.head_dim, attention.num_key_value_groups
        self.layer_idx = attention.layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """Map (B, T, D) to (B, T, D)."""
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if past_key_values is not None:
            # caches count tokens by what a layer put there, and masks are made from the count of the first
            mark = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)  # (B, 1, T, 1)
            past_key_values.update(mark, mark, self.layer_idx)
        return self.get_submodule("o_proj")(nothing), None


class Llama(PrunableModel):
    """KV groups (a key and value head with its query heads) and MLP neurons as unit groups."""

    fixed_blocks = None

    def __init__(self, network: nn.Module, recipe: Recipe, training: Training | None = None) -> None:
        refuse_uncovered(network)
        rotary = network.get_submodule("model.rotary_emb")
        network.get_submodule("model").rotary_emb = recast(rotary, exact_rotary(type(rotary)))
        super().__init__(network, recipe, training)

    @property
    def name(self) -> str:
        """The name of the hub or of the folder it came from, without what leads there."""
        return str(self.recipe.arguments["name"] or self.recipe.arguments["settings"]["model_type"]).split("/")[-1]

    @property
    def attention(self) -> str:
        """Transformers' name of what it computes attention by."""
        return str(self.network.config._attn_implementation)  # type: ignore[union-attr]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group of KV groups and one of neurons a layer."""
        pairs = ((self._heads(i, layer), self._neurons(i, layer)) for i, layer in enumerate(self.blocks()))
        return tuple(group for pair in pairs for group in pair)

    def blocks(self) -> tuple[str, ...]:
        """Layers from input to output."""
        return tuple(f"model.layers.{i}" for i in range(len(self.network.get_submodule("model.layers"))))  # type: ignore[arg-type]

    def feature_points(self) -> tuple[str, ...]:
        """First norm of each layer, then the final norm."""
        return (*(f"{layer}.input_layernorm" for layer in self.blocks()), "model.norm")

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the token after each one, (B, T, vocabulary)."""
        tokens = batch["input_ids"]
        # a row of positions for each sample: what is made of them can then be stacked like all else in a batch
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        # on the meta device there are no values: no padding to look for, and with a cache nothing else is looked for
        empty = tokens.is_meta
        mask = None if empty else batch.get("attention_mask")
        return self.network(tokens, attention_mask=mask, position_ids=positions, use_cache=empty).logits

    @property
    def context(self) -> int:
        """Most tokens that it can read."""
        most = int(self.network.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
        return most if self.preprocessing is None else min(most, self.preprocessing.longest)

    def new_cache(self, longest: int | None = None) -> Cache:
        """An empty cache: one that grows, or one of a fixed length in place."""
        config: Any = self.network.config
        if longest is None:
            return DynamicCache(config=config)
        # every layer at full length, whatever its window: the masks see to that, and a rolling cache counts its tokens
        # in a Python number, for which code is compiled anew at every token and which can't be set back
        return Cache(layers=[StaticLayer(max_cache_len=longest) for _ in self.blocks()])

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Read tokens (B, T) at positions (B, T) into the cache; logits of the token after the last, (B, V)."""
        found = self.network(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1]

    def why_not_mergeable(self) -> str:
        """Every token is answered to."""
        return "a causal language model answers at every token, so none can be merged into another"

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        shorten_transformer(self.network, self.blocks(), kept)

    def stock_files(self, folder: Path) -> str | None:
        """Transformers can express one number of heads and one of neurons for all layers."""
        if self.preprocessing is not None:
            self.preprocessing.tokenizer.save_pretrained(folder)
        write_generation_defaults(self.network, folder)
        counts = {kind: [g.count for g in self.unit_groups() if g.kind == kind] for kind in ("head", "neuron")}
        for kind, what in (("head", "KV groups"), ("neuron", "neurons")):
            if len(set(counts[kind])) > 1 or 0 in counts[kind]:
                found = ", ".join(map(str, sorted(set(counts[kind]))))
                return f"transformers has one number of {what} for all layers, above 0; here they are {found}"
        attention = self.network.get_submodule(f"{self.blocks()[0]}.self_attn")
        heads, shared = counts["head"][0], int(attention.num_key_value_groups)  # type: ignore[arg-type]
        sizes = {"num_attention_heads": heads * shared, "num_key_value_heads": heads, "head_dim": attention.head_dim}
        try:
            write_stock(self, folder, {**sizes, "intermediate_size": counts["neuron"][0]})
        except StrictDataclassError as error:
            return f"transformers refuses {heads * shared} heads: {str(error).splitlines()[-1].strip()}"
        return None

    def _heads(self, number: int, layer: str) -> UnitGroup:
        name = f"{layer}.self_attn"
        attention = self.network.get_submodule(name)
        width, shared = int(attention.head_dim), int(attention.num_key_value_groups)  # type: ignore[arg-type]
        count = int(self.network.get_submodule(f"{name}.k_proj").out_features) // width  # type: ignore[arg-type]
        keys, queries = unit_index(count, width), unit_index(count, shared * width)
        return UnitGroup(
            name=f"{layer}.heads",
            kind="head",
            layer=number,
            count=count,
            width=shared * width,
            producers=(
                *rows(self.network, f"{name}.q_proj", queries),
                *rows(self.network, f"{name}.k_proj", keys),
                *rows(self.network, f"{name}.v_proj", keys),
            ),
            consumer=Consumer(f"{name}.o_proj", -1, queries),
            emptied=Emptied(name, NoHeads),
            pairwise_features=2 * shared * width,
        )

    def _neurons(self, number: int, layer: str) -> UnitGroup:
        index = unit_index(int(self.network.get_submodule(f"{layer}.mlp.gate_proj").out_features), 1)  # type: ignore[arg-type]
        return UnitGroup(
            name=f"{layer}.neurons",
            kind="neuron",
            layer=number,
            count=len(index),
            width=1,
            producers=tuple(p for n in ("gate_proj", "up_proj") for p in rows(self.network, f"{layer}.mlp.{n}", index)),
            consumer=Consumer(f"{layer}.mlp.down_proj", -1, index),
            after_cut=(Attribute(f"{layer}.mlp", "intermediate_size"),),
        )


def exact_rotary(kind: type[nn.Module]) -> type[nn.Module]:
    """A rotary embedding whose frequencies stay float32 whatever the network is cast to.

    Transformers computes them in float32; `network.to(bfloat16)` would round them, and with them
    every position.
    """

    class Exact(kind):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            exact = dict(self.named_buffers())
            super()._apply(fn, recurse)
            for name, frequencies in exact.items():
                setattr(self, name, frequencies.to(getattr(self, name).device))
            return self

    return Exact


def refuse_uncovered(network: nn.Module) -> None:
    """Raise an InputError that says why a network's units can't be cut."""
    config: Any = network.config
    if (kind := str(config.model_type)) not in COVERED:
        why = NOT_COVERED.get(kind, f"its layout is not known here; covered are {', '.join(COVERED)}")
        raise InputError(f"model=llama: the layout of {kind} cannot be cut exactly: {why}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError("model=llama: its weights are quantized; quantized rows and columns cannot be cut exactly")


@checked
def llama(
    *,
    name: str | None = None,
    checkpoint: ExistingPath | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Literal["byte"] | None = None,
    training: Training | None = None,
) -> Llama:
    """Build a causal language model with its weights, or at random where only `settings` are given.

    Args:
        name: A hub name, such as `meta-llama/Llama-3.2-1B`; unused when `checkpoint` is given.
        checkpoint: A folder in transformers' format or one that `save=true` wrote.
        settings: A configuration in transformers' terms, `model_type` included (default llama), to
            build at random weights.
        tokenizer: `byte`, one token a byte, for a model built from settings; others bring their own.
        training: How to train a model built from settings on first use.

    Raises:
        InputError: If the family is not covered, weights are missing or don't fit, or the tokenizer
            has more tokens than the embedding has rows.
    """
    arguments = {"name": name, "settings": dict(settings or {}), "tokenizer": tokenizer}
    if checkpoint is not None and (Path(checkpoint) / MANIFEST).is_file():
        stored = stored_recipe(checkpoint, Recipe("models.llama.llama", arguments))
        network = build_causal(stored.arguments["settings"])
        read_generation_defaults(network, Path(checkpoint))
        model = Llama(network, stored)
        return _with_tokenizer(load_weights(model, checkpoint), checkpoint, True)
    if (source := checkpoint or name) is None:
        return _fresh(arguments, training)
    network = causal_network(source, checkpoint is not None, config_of(source, checkpoint is not None, settings or {}))
    arguments |= {"name": str(source).rstrip("/").split("/")[-1], "settings": plain_config(network)}
    model = Llama(network, Recipe("models.llama.llama", arguments))
    model.has_weights = True
    return _with_tokenizer(model, source, checkpoint is not None)


def _fresh(arguments: dict[str, Any], training: Training | None) -> Llama:
    if not arguments["settings"]:
        raise InputError("model=llama: give model.checkpoint=<folder>, model.name=<hub name>, or model.settings")
    settings = {"model_type": "llama", **arguments["settings"]}
    refuse_unknown_settings(settings, str(settings["model_type"]))
    read = byte_tokenizer(settings.get("max_position_embeddings", 2048)) if arguments["tokenizer"] else None
    if read is not None:
        special = {"bos_token_id": read.bos_token_id, "eos_token_id": read.eos_token_id, "pad_token_id": None}
        settings = {"vocab_size": len(read), **special, **settings}
    network = build_causal(settings)
    recipe = Recipe("models.llama.llama", {**arguments, "settings": plain_config(network)})
    model = Llama(network, recipe, training)
    if read is not None:
        refuse_larger_vocabulary(read, network, "model.tokenizer=byte")
        model.preprocessing = text_preprocessing(read, network.config)
    return model


def _with_tokenizer(model: Llama, source: str, local: bool) -> Llama:
    read = load_tokenizer(source, local)
    if read is not None:
        key = f"model.checkpoint={source}" if local else f"model.name={source}"
        refuse_larger_vocabulary(read, model.network, key)
    model.preprocessing = text_preprocessing(read, model.network.config)
    return model
