"""BERT and its kin from transformers: encoders with a head for labels, numbers or answer spans."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Attribute, Batch, Consumer, Emptied, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.bert_keeping import drop_in_layer
from models.bert_packing import run_packed
from models.checkpoint import MANIFEST, load_weights, stored_recipe
from models.depth import shorten_transformer
from models.hf import (
    HEAD_WORDS,
    Head,
    build_network,
    config_of,
    head_weights,
    load_tokenizer,
    loaded_network,
    text_preprocessing,
    write_stock,
)
from models.keeping import Keeping
from models.keeping_flow import KeepingFlow
from models.ragged import Packing, cumulative, packing_of
from models.settings import refuse_unknown_settings
from utils.errors import InputError
from utils.rules import Count, ExistingPath, checked
from utils.training import Training


@dataclass(frozen=True)
class Layout:
    """Where an encoder's parts lie; module names are relative to one layer.

    Attributes:
        layers: The list of layers, relative to the encoder.
        attention: The module that keeps the number of heads.
        projections: Query, key and value.
        output: The linear that reads the heads.
        hidden: The linear that makes the neurons.
        reader: The linear that reads them.
        counts: Attributes of the attention that follow the number of heads, with the head
            width as factor or not.
    """

    layers: str
    attention: str
    projections: tuple[str, str, str]
    output: str
    hidden: str
    reader: str
    counts: tuple[tuple[str, bool], ...]


STANDARD = Layout(
    layers="encoder.layer",
    attention="attention.self",
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense",
    hidden="intermediate.dense",
    reader="output.dense",
    counts=(("num_attention_heads", False), ("all_head_size", True)),
)
DISTILBERT = Layout(
    layers="transformer.layer",
    attention="attention",
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    output="attention.out_lin",
    hidden="ffn.lin1",
    reader="ffn.lin2",
    counts=(("n_heads", False),),
)
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(
        ("bert", "roberta", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "ernie", "data2vec-text",
         "megatron-bert", "roberta-prelayernorm"),
        STANDARD,
    ),
    "distilbert": DISTILBERT,
}  # fmt: skip
PACKED_TOKENS = "packed_tokens"
FRONT = 1  # the class token
NOT_COVERED = {
    "albert": "its layers share one set of weights, so a unit can't go from one layer alone",
    "mpnet": "its layers share one table of relative positions by head",
    "deberta": "its disentangled attention has products that a cut does not reach",
    "deberta-v2": "its disentangled attention has products that a cut does not reach",
    "mobilebert": "its feed-forward networks are stacked in each layer",
    "convbert": "its attention mixes heads with convolutions",
    "squeezebert": "its projections are grouped convolutions",
    "modernbert": "its attention rotates queries and keys in one fused projection",
}


class NoHeads(nn.Module):
    """Stands in for an attention without heads, whose own reshape cannot run on nothing.

    Keeps the (empty) projections under their names, for checkpoints. Where the attention
    owns the linear that reads the heads, its bias is still added.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        for name in ("num_attention_heads", "attention_head_size", "all_head_size", "n_heads"):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map (B, T, D) to (B, T, 0), or to (B, T, D) where the output linear is inside."""
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        output = dict(self.named_children()).get("out_lin", nn.Identity())
        return output(nothing), None


class Bert(PrunableModel):
    """Heads and feed-forward neurons of a BERT-like encoder as unit groups.

    Attributes:
        packed: Whether it runs on packed tokens, without padding (`run_packed`).
    """

    fixed_blocks = None

    def __init__(self, network: nn.Module, recipe: Recipe, training: Training | None = None) -> None:
        self._layout = layout_of(network)
        self._layers = f"{network.base_model_prefix}.{self._layout.layers}"
        self._accepted = frozenset(inspect.signature(network.forward).parameters)
        self.packed = False
        super().__init__(network, recipe, training)

    @property
    def name(self) -> str:
        """The name of the hub or of the folder it came from, without what leads there."""
        return str(self.recipe.arguments["name"] or self.recipe.arguments["settings"]["model_type"]).split("/")[-1]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group of heads and one of neurons a layer."""
        pairs = ((self._heads(i, layer), self._neurons(i, layer)) for i, layer in enumerate(self.blocks()))
        return tuple(group for pair in pairs for group in pair)

    def blocks(self) -> tuple[str, ...]:
        """Layers from input to output."""
        return tuple(f"{self._layers}.{i}" for i in range(len(self.network.get_submodule(self._layers))))  # type: ignore[arg-type]

    def feature_points(self) -> tuple[str, ...]:
        """The second feed-forward linear of each layer, before dropout, residual and norm."""
        return tuple(f"{layer}.{self._layout.reader}" for layer in self.blocks())

    def logits(self, batch: Batch) -> Tensor:
        """Logits of labels (B, C), a number (B, 1), or of span starts and ends (B, T, 2)."""
        inputs: dict[str, Any] = {n: tensor for n, tensor in batch.items() if n in self._accepted - {"labels"}}
        if PACKED_TOKENS in batch:
            inputs["packing"] = _placed_packing(batch)
        if isinstance(self.reduction, Keeping):
            self._announce(batch, self.reduction)
        found = self.network(**inputs)
        if self.recipe.arguments["head"] == "question_answering":
            return torch.stack([found.start_logits, found.end_logits], dim=-1)
        return found.logits

    @property
    def class_token(self) -> bool:
        """The answer is read from the first token."""
        return True

    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that begin and end texts, where the tokenizer is known."""
        if self.preprocessing is None:
            return ()
        tokenizer = self.preprocessing.tokenizer
        named = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        return tuple(sorted(named - {None}))

    def why_not_droppable(self) -> str | None:
        """Why its tokens can't be dropped, in one line; None if they can."""
        if self.recipe.arguments["head"] == "question_answering":
            return "an answer may start at any token, so none can go"
        packed = "it runs packed from the embedding on; take model.packed=false with prune.batching=pack"
        return packed if self.packed else None

    def never_dropped(self, example: Batch) -> int:
        """The class token, and all others whose ids are special."""
        ids, special = example["input_ids"], torch.tensor(self.special_tokens())
        return FRONT + int(torch.isin(ids[0, FRONT:].cpu(), special).sum())

    def _drop_tokens(self, keeping: Keeping) -> None:
        flow, where = KeepingFlow(keeping, FRONT), self._layout
        names = [name.removeprefix(f"{where.attention}.") for name in (*where.projections, where.output)]
        query, key, value, output = names
        inside = output if where.output.startswith(f"{where.attention}.") else None
        layers: Any = self.network.get_submodule(self._layers)
        for i, layer in enumerate(layers):
            layers[i] = drop_in_layer(layer, i, flow, where.attention, (query, key, value), inside)

    def _announce(self, batch: Batch, keeping: Keeping) -> None:
        """Tell the layers which tokens there are, and which must stay."""
        mask = batch.get("attention_mask")
        special = None
        if keeping.special:
            known = torch.tensor(keeping.special, device=batch["input_ids"].device)
            special = torch.isin(batch["input_ids"], known)
        first: Any = self.network.get_submodule(self.blocks()[0])
        first.flow.begin(None if mask is None else mask != 0, special)

    def _keep_blocks(self, kept: Sequence[int]) -> None:
        shorten_transformer(self.network, self.blocks(), kept)

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the model's device; a packed model gets the positions of its tokens with it.

        They are found where the batch lies, so that a GPU is not waited for in the forward pass.
        """
        placed = super().place(batch)
        if not self.packed or "attention_mask" not in batch:
            return placed
        tokens = packing_of(batch["attention_mask"]).index
        return placed | {PACKED_TOKENS: tokens.to(self.device, non_blocking=True)}

    def run_packed(self) -> None:
        """Run on packed tokens from now on, in place: padding costs nothing, the answers stay the same."""
        if self.packed:
            return
        names = (f"{layer}.{self._layout.attention}" for layer in self.blocks())
        attentions = [m for name in names if not isinstance(m := self.network.get_submodule(name), NoHeads)]
        prefix, encoder = self.network.base_model_prefix, self._layout.layers.rpartition(".")[0]
        base = run_packed(self.network.get_submodule(str(prefix)), encoder, attentions)
        setattr(self.network, str(prefix), base)
        self.packed = True

    def stock_files(self, folder: Path) -> str | None:
        """Transformers can express one feed-forward width for all layers, and every head."""
        if self.preprocessing is not None:
            self.preprocessing.tokenizer.save_pretrained(folder)
        groups = self.unit_groups()
        if self.reduction is not None and self.reduction.merges:
            return "transformers cannot express dropped tokens"
        if any(group.count != self.dense_counts[group.name] for group in groups if group.kind == "head"):
            return "transformers ties the width of a head to the number of heads, which must divide the model's width"
        widths = sorted({group.count for group in groups if group.kind == "neuron"})
        if len(widths) > 1 or 0 in widths:
            return (
                f"transformers has one feed-forward width for all layers, here they are {', '.join(map(str, widths))}"
            )
        key = "hidden_dim" if self._layout is DISTILBERT else "intermediate_size"
        write_stock(self, folder, {key: widths[0]})
        return None

    def _heads(self, number: int, layer: str) -> UnitGroup:
        where = self._layout
        attention = self.network.get_submodule(f"{layer}.{where.attention}")
        width = int(attention.attention_head_size)  # type: ignore[arg-type]
        made = self.network.get_submodule(f"{layer}.{where.projections[0]}")
        index = unit_index(int(made.out_features) // width, width)  # type: ignore[arg-type]
        return UnitGroup(
            name=f"{layer}.heads",
            kind="head",
            layer=number,
            count=len(index),
            width=width,
            producers=tuple(p for name in where.projections for p in rows(self.network, f"{layer}.{name}", index)),
            consumer=Consumer(f"{layer}.{where.output}", -1, index),
            after_cut=tuple(
                Attribute(f"{layer}.{where.attention}", name, per_unit=width if wide else 1)
                for name, wide in where.counts
            ),
            emptied=Emptied(f"{layer}.{where.attention}", NoHeads),
            pairwise_features=2 * width,
        )

    def _neurons(self, number: int, layer: str) -> UnitGroup:
        hidden = f"{layer}.{self._layout.hidden}"
        index = unit_index(int(self.network.get_submodule(hidden).out_features), 1)  # type: ignore[arg-type]
        return UnitGroup(
            name=f"{layer}.neurons",
            kind="neuron",
            layer=number,
            count=len(index),
            width=1,
            producers=rows(self.network, hidden, index),
            consumer=Consumer(f"{layer}.{self._layout.reader}", -1, index),
        )


def _placed_packing(batch: Batch) -> Packing:
    """The packing of a placed batch; its sizes are known from shapes alone."""
    mask = batch["attention_mask"]
    lengths = (mask != 0).sum(dim=1)
    return Packing(batch[PACKED_TOKENS], cumulative(lengths), mask.shape[1], mask.shape[1])


def layout_of(network: nn.Module) -> Layout:
    """Where a network's units lie, or an InputError that says why they can't be cut."""
    config: Any = network.config
    kind = str(config.model_type)
    if kind not in LAYOUTS:
        why = NOT_COVERED.get(kind, f"its layout is not known here; covered are {', '.join(LAYOUTS)}")
        raise InputError(f"model=bert: the layout of {kind} cannot be cut exactly: {why}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise InputError(f"model=bert: this {kind} is configured as a decoder; an encoder is needed")
    return LAYOUTS[kind]


@checked
def bert(
    *,
    name: str | None = None,
    head: Head = "classification",
    classes: Count | None = None,
    checkpoint: ExistingPath | None = None,
    new_head: bool = False,
    packed: bool = False,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> Bert:
    """Build an encoder of the BERT family with its weights, or at random where only `settings` are given.

    Args:
        name: A hub name, such as `bert-base-uncased`; unused when `checkpoint` is given.
        head: What is put on the encoder.
        classes: Labels of a classifier; 1 is regression. None takes the checkpoint's own.
        checkpoint: A folder in transformers' format or one that `save=true` wrote.
        new_head: Put a fresh head on the loaded encoder and train on first use.
        packed: Run without padding; the answers are the same to rounding.
        settings: A configuration in transformers' terms, `model_type` included, to build
            at random weights.
        training: How to train where the weights are not complete.

    Raises:
        InputError: If the family is not covered, or weights are missing or don't fit.
    """
    model = _bert(name, head, classes, checkpoint, new_head, settings, training)
    if packed:
        model.run_packed()
    return model


def _bert(
    name: str | None, head: Head, classes: int | None, checkpoint: str | None, new_head: bool,
    settings: Mapping[str, Any] | None, training: Training | None,
) -> Bert:  # fmt: skip
    if checkpoint is not None and (Path(checkpoint) / MANIFEST).is_file():
        asked = Recipe("models.bert.bert", {"name": name, "head": head, "classes": classes, "settings": settings})
        return _saved(checkpoint, stored_recipe(checkpoint, asked), asked, training if new_head else None)
    source = checkpoint or name
    if source is None:
        return _fresh(head, classes, settings, training)
    config = config_of(source, checkpoint is not None, settings or {})
    network, complete = loaded_network(source, checkpoint is not None, config, head, classes, new_head)
    arguments = {"name": str(source).rstrip("/").split("/")[-1], "head": head, "classes": classes}
    recipe = Recipe("models.bert.bert", {**arguments, "settings": _plain(network)})
    model = Bert(network, recipe, None if complete else training)
    model.has_weights = complete
    if not complete:
        model.notes.append("The weights brought no head for this task: one was put on and trained with the model here.")
    model.preprocessing = text_preprocessing(load_tokenizer(source, checkpoint is not None), network.config)
    return model


def _fresh(head: Head, classes: int | None, settings: Mapping[str, Any] | None, training: Training | None) -> Bert:
    refuse_unknown_settings(settings or {}, str((settings or {}).get("model_type")))
    network = build_network(settings or {}, head, classes)
    arguments = {"name": None, "head": head, "classes": classes, "settings": _plain(network)}
    return Bert(network, Recipe("models.bert.bert", arguments), training)


def _saved(checkpoint: str, recipe: Recipe, asked: Recipe, new_head: Training | None) -> Bert:
    """A model that `save=true` wrote, its sizes from the manifest; with a head to be trained if so asked."""
    if new_head is not None:
        return _saved_body(checkpoint, recipe, asked, new_head)
    stored = recipe.arguments
    for key in ("head", "classes"):
        wanted = asked.arguments[key]
        if wanted is not None and stored[key] is not None and wanted != stored[key]:
            raise InputError(
                f"model.checkpoint={checkpoint}: was saved with {key}={stored[key]}, asked is {wanted}; "
                "model.new_head=true trains a new head on first use"
            )
    model = Bert(build_network(stored["settings"], stored["head"], stored["classes"]), recipe)
    load_weights(model, checkpoint)
    model.preprocessing = text_preprocessing(load_tokenizer(checkpoint, True), model.network.config)
    return model


def _saved_body(checkpoint: str, recipe: Recipe, asked: Recipe, training: Training) -> Bert:
    head, classes = asked.arguments["head"], asked.arguments["classes"]
    network = build_network(recipe.arguments["settings"], head, classes)
    arguments = {**recipe.arguments, "head": head, "classes": classes, "settings": _plain(network)}
    model = Bert(network, Recipe(recipe.builder, arguments), training)
    load_weights(model, checkpoint, skip=head_weights(network), foreign=HEAD_WORDS)
    model.training, model.has_weights = training, False
    model.preprocessing = text_preprocessing(load_tokenizer(checkpoint, True), network.config)
    model.notes.append("The checkpoint's head was replaced: a new one was trained with the model here.")
    return model


def _plain(network: nn.Module) -> dict[str, Any]:
    """A network's configuration as JSON values."""
    return json.loads(network.config.to_json_string(use_diff=False))  # type: ignore[union-attr,operator]
