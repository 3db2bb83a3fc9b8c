"""Keys of `model.settings`: transformers takes any without a word, so that a misspelt one would change nothing.

They are held against the fields of the configuration's own class.
"""

import inspect
import re
from collections.abc import Mapping, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import RopeParameters

from utils.check import suggest
from utils.errors import InputError

ROPE, OLD_ROPE = "rope_parameters", ("rope_theta", "rope_scaling", "partial_rotary_factor")
# no fields, but honoured by every configuration; the last one is what tells a tokenizer to say which text is which
COMMON = (
    "model_type", "num_labels", "torch_dtype", "attn_implementation", "_attn_implementation", "output_attentions",
    "type_vocab_size",
)  # fmt: skip
# of backbones
MAPS = ("out_features", "out_indices")


def refuse_unknown_settings(
    settings: Mapping[str, Any], kind: str, fresh: bool = True, key: str = "model.settings"
) -> None:
    """Raise an InputError for a key that a configuration has no use for, with what was probably meant.

    A kind that transformers does not know is left to transformers to refuse.

    Args:
        settings: Keys and values in transformers' terms, those of inner configurations included.
        kind: The `model_type`.
        fresh: Whether they make a new configuration; on top of one that exists, keys of older versions
            (`rope_theta`) would be passed over.
        key: What the settings are called in the message.
    """
    if kind not in CONFIG_MAPPING:
        return
    config = CONFIG_MAPPING[kind]
    known = known_settings(config)
    older = {*OLD_ROPE} if ROPE in known else set()
    known |= older | _asked_for(config) if fresh else set()
    for name, value in settings.items():
        if name in older - known:
            raise InputError(f"{key}.{name}={value}: would be passed over where there is a configuration; give {ROPE}")
        if name not in known:
            shown = {other for other in known if not other.startswith("_")}
            raise InputError(
                f"{key}.{name}={value}: the configuration of {kind} has no {name!r}; {suggest(name, shown)}"
            )
        if name in (ROPE, "rope_scaling") and isinstance(value, Mapping):
            _refuse_unknown_rope(value, f"{key}.{name}")
        elif isinstance(value, Mapping) and "model_type" in value:
            refuse_unknown_settings(value, str(value["model_type"]), fresh, f"{key}.{name}")


def known_settings(config: Any) -> set[str]:
    """Names that a class of configurations takes."""
    found = {field.name for field in fields(config)}
    maps = {name for name in MAPS if f"_{name}" in found}
    # what it writes of itself it takes back, too
    return found | {*config().to_dict(), *config.attribute_map, *COMMON} | maps


def _asked_for(config: Any) -> set[str]:
    """Names that the network's code reads where there are any: Qwen2's `head_dim` is no field, and counts."""
    own = Path(inspect.getfile(config))
    network = own.with_name(own.name.replace("configuration_", "modeling_"))
    if network == own or not network.is_file():
        return set()
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', network.read_text(encoding="utf-8")))


def _refuse_unknown_rope(given: Mapping[str, Any], key: str) -> None:
    known: Set[str] = RopeParameters.__annotations__.keys() | {"type"}
    for name, value in given.items():
        # of several kinds of layers each may have its own
        if name not in known and not isinstance(value, Mapping):
            raise InputError(f"{key}.{name}={value}: rotary embeddings have no {name!r}; {suggest(name, known)}")
