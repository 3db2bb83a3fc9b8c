"""What all families from transformers share: configurations, weights, tokenizers, stock folders."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from models.base import PrunableModel
from models.preprocessing import TextPreprocessing
from models.remote_code import refuse_remote_code
from models.settings import refuse_unknown_settings
from models.shards import refuse_missing_shards
from utils.errors import InputError
from utils.hub import from_cache_or_hub
from utils.plain_json import read_json

Head = Literal["classification", "question_answering"]
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
HEAD_WORDS = ("classifier", "pre_classifier", "qa_outputs", "pooler", "score")
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
SPECIAL_TOKENS = {
    "pad_token": ("[PAD]",), "unk_token": ("[UNK]", "<unk>"), "cls_token": ("[CLS]",), "sep_token": ("[SEP]",),
    "bos_token": ("<s>", "<|begin_of_text|>"), "eos_token": ("</s>", "<|end_of_text|>"),
}  # fmt: skip


def config_of(source: str, local: bool, settings: Mapping[str, Any]) -> Any:
    """A model's configuration from a folder or the hub, with `settings` on top.

    Raises:
        InputError: If it can't be had, or a setting is none of its own or would make it another kind.
    """

    def load(only_here: bool, **settings: Any) -> Any:
        return AutoConfig.from_pretrained(source, local_files_only=only_here, trust_remote_code=False, **settings)

    config = _fetched(load, source, local)
    if not settings:
        return config
    refuse_unknown_settings(settings, config.model_type, fresh=False)
    if (kind := settings.get("model_type", config.model_type)) != config.model_type:
        raise InputError(f"model.settings.model_type={kind}: {source} holds a {config.model_type}; leave it out")
    return _fetched(partial(load, **settings), source, local)


def _fetched(load: Any, source: str, local: bool) -> Any:
    """What `load` gives, from a folder, the hub's cache or the hub, with its errors as messages."""
    if not local:
        return from_cache_or_hub(load, f"model.name={source}", "model.checkpoint=<folder>")
    if not Path(source).is_dir():
        raise InputError(
            f"model.checkpoint={source}: must be a folder in transformers' format, or one that save=true wrote"
        )
    refuse_remote_code(Path(source))
    refuse_missing_shards(Path(source))
    try:
        return load(True)
    except Exception as error:  # what a damaged folder raises depends on where the damage is
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"model.checkpoint={source}: cannot be loaded by transformers: {first}") from error


def auto_class(head: str) -> Any:
    """Transformers' class that puts a head on whatever encoder a configuration names."""
    return getattr(transformers, AUTO_CLASSES[head])


def build_network(settings: Mapping[str, Any], head: Head, classes: int | None) -> nn.Module:
    """Build a network at random weights from a configuration in transformers' terms.

    Raises:
        InputError: If `settings` has no `model_type` or does not make a network.
    """
    given = dict(settings)
    kind = given.pop("model_type", None)
    if kind is None:
        raise InputError(
            "model.settings: must name a model_type, such as bert, where neither name nor checkpoint is given"
        )
    try:
        config = AutoConfig.for_model(kind, **given)
        set_labels(config, head, classes)
        with quiet():
            return auto_class(head).from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"model.settings: cannot build a {kind} with {head} from them: {error}") from error


def build_causal(settings: Mapping[str, Any]) -> nn.Module:
    """Build a causal language model at random weights from a configuration in transformers' terms.

    Raises:
        InputError: If `settings` does not make a network.
    """
    given = dict(settings)
    kind = given.pop("model_type", "llama")
    try:
        with quiet():
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"model.settings: cannot build a causal {kind} from them: {why}") from error


def causal_network(source: str, local: bool, config: Any) -> nn.Module:
    """Load a causal language model, all weights of it.

    Raises:
        InputError: If weights are missing, or shapes differ.
    """
    return whole_network(AutoModelForCausalLM, source, local, config)


def whole_network(kind: Any, source: str, local: bool, config: Any, unread: Sequence[str] = ()) -> nn.Module:
    """Load a network by one of transformers' classes, all weights of it.

    Args:
        kind: The class, which has `from_pretrained`.
        source: A folder, or a hub name.
        local: Whether it is a folder.
        config: What the network is built from.
        unread: Parts of names of weights that may be missing, since nothing is computed with them.

    Raises:
        InputError: If weights are missing, or shapes differ.
    """

    def load(only_here: bool) -> Any:
        with quiet():
            return kind.from_pretrained(
                source, config=config, local_files_only=only_here, output_loading_info=True,
                dtype=config.dtype or torch.float32,
            )  # fmt: skip

    network, found = _fetched(load, source, local)
    if missing := sorted(name for name in found["missing_keys"] if not any(part in name for part in unread)):
        key = f"model.checkpoint={source}" if local else f"model.name={source}"
        raise InputError(
            f"{key}: first difference at {missing[0]!r}: the file has nothing, the model {_shape(network, missing[0])}"
        )
    return network


def plain_config(network: nn.Module) -> dict[str, Any]:
    """A network's configuration as JSON values, without the path that it came from."""
    found = json.loads(network.config.to_json_string(use_diff=False))  # type: ignore[union-attr,operator]
    return {name: value for name, value in found.items() if name != "_name_or_path"}


def refuse_larger_vocabulary(tokenizer: Any, network: nn.Module, key: str) -> None:
    """Raise an InputError if a tokenizer has ids that the network's embedding has no row for."""
    largest, rows = max(tokenizer.get_vocab().values()), network.config.vocab_size  # type: ignore[union-attr]
    if largest >= rows:  # type: ignore[operator]
        raise InputError(
            f"{key}: its tokenizer has token ids up to {largest}, the embedding {rows} rows; they don't belong together"
        )


def set_labels(config: Any, head: Head, classes: int | None) -> None:
    """Give a configuration as many labels as there are classes; a start and an end for answers."""
    wanted = 2 if head == "question_answering" else classes
    if wanted is not None and config.num_labels != wanted:
        config.num_labels = wanted


def loaded_network(
    source: str, local: bool, config: Any, head: Head, classes: int | None, new_head: bool
) -> tuple[nn.Module, bool]:
    """Load a network and say whether its weights are complete, head included.

    Raises:
        InputError: If weights other than the head's are missing, or shapes differ.
    """
    wanted = AUTO_CLASSES[head].removeprefix("AutoModel")
    has_head = any(str(name).endswith(wanted) for name in config.architectures or ())
    key = f"model.checkpoint={source}" if local else f"model.name={source}"
    if head == "classification" and classes is not None and config.num_labels != classes:
        if has_head and not new_head:
            raise InputError(
                f"{key}: first difference at the classifier: it answers in {config.num_labels} labels, the data has "
                f"{classes}; model.new_head=true trains a new classifier on first use"
            )
    set_labels(config, head, classes)
    config.problem_type = None  # it is the old head's; a new one may be of another kind

    def load(only_here: bool) -> Any:
        with quiet():
            return auto_class(head).from_pretrained(
                source, config=config, local_files_only=only_here, output_loading_info=True,
                ignore_mismatched_sizes=new_head, dtype=config.dtype or torch.float32,
            )  # fmt: skip

    network, found = _fetched(load, source, local)
    missing = sorted(found["missing_keys"])
    if body := [name for name in missing if not any(word in name for word in HEAD_WORDS)]:
        raise InputError(
            f"{key}: first difference at {body[0]!r}: the file has nothing, the model {_shape(network, body[0])}"
        )
    fresh = [name for name in missing if "pooler" not in name or head == "classification"]
    if new_head and has_head:
        _renew_head(network)
    return network, not fresh and not (new_head and has_head)


def _shape(network: nn.Module, name: str) -> tuple[int, ...] | str:
    tensor = network.state_dict().get(name)
    return "another layout" if tensor is None else tuple(tensor.shape)


def head_weights(network: nn.Module) -> tuple[str, ...]:
    """Names of what is put on the encoder."""
    return tuple(n for n, _ in network.named_parameters() if any(word in n for word in HEAD_WORDS if word != "pooler"))


def _renew_head(network: nn.Module) -> None:
    """Put a head back to random weights, as its family initialises them."""
    spread = getattr(network.config, "initializer_range", 0.02)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and any(word in name for word in HEAD_WORDS if word != "pooler"):
            nn.init.normal_(module.weight, std=spread)
            nn.init.zeros_(module.bias)


def load_tokenizer(source: str, local: bool) -> Any:
    """The fast tokenizer that comes with a model; None if the folder has none."""
    folder = Path(source)
    if local and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None

    def load(only_here: bool) -> Any:
        with quiet():
            return AutoTokenizer.from_pretrained(source, local_files_only=only_here, trust_remote_code=False)

    bare = local and (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file()
    if bare:  # without its configuration transformers cannot tell which class it is
        return _bare_tokenizer(folder / "tokenizer.json")
    return _fetched(load, source, local)


def _bare_tokenizer(file: Path) -> Any:
    """A tokenizer from its rules alone; its special tokens are those of the usual names that it has."""
    known = PreTrainedTokenizerFast(tokenizer_file=str(file)).get_vocab()
    found = {role: next((name for name in names if name in known), None) for role, names in SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **{r: name for r, name in found.items() if name})


def text_preprocessing(tokenizer: Any, config: Any) -> TextPreprocessing | None:
    """What text sources need to know of a model; None without a tokenizer."""
    if tokenizer is None:
        return None
    # RoBERTa and its kin count positions from behind the padding index
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    # a tokenizer rebuilt from its rules alone forgets that the encoder tells first from second texts
    if getattr(config, "type_vocab_size", 1) > 1 and "token_type_ids" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    longest = min(config.max_position_embeddings - offset, tokenizer.model_max_length)
    names = dict(config.id2label or {})
    labels = tuple(str(names[i]) for i in sorted(names))
    return TextPreprocessing(tokenizer, longest, labels, ends_of(tokenizer.eos_token_id, config))


def ends_of(own: int | None, config: Any) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's own, and what a configuration names beside it."""
    named = getattr(config, "eos_token_id", None)
    if isinstance(named, list) and own in named:
        return tuple(named)
    # one that the tokenizer does not know of may be a default that means something else to it
    return () if own is None else (own,)


def write_stock(model: PrunableModel, folder: Path, changed: Mapping[str, Any]) -> None:
    """Write config.json with the cut sizes, with which `from_pretrained` loads the weights beside it."""
    config = type(model.network.config).from_dict({**model.network.config.to_dict(), **changed})  # type: ignore[union-attr]
    config.architectures = [type(model.network).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)


def write_generation_defaults(network: Any, folder: Path) -> None:
    """Keep how a model is to be asked for text (its ends, its temperature), where it says more than its configuration.

    Written as it is: transformers refuses to save what it reads, such as a temperature beside greedy decoding.
    """
    if not getattr(network.generation_config, "_from_model_config", True):
        network.generation_config.to_json_file(folder / GENERATION)


def read_generation_defaults(network: Any, folder: Path) -> None:
    """Take over what `write_generation_defaults` kept.

    Raises:
        InputError: If the file is damaged.
    """
    if not (folder / GENERATION).is_file():
        return
    try:
        with quiet():
            network.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"model.checkpoint={folder}: {GENERATION} cannot be read: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and load reports off the screen."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
