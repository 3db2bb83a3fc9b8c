"""Configuration files of OPTIN's authors as settings of ours: which key becomes which, and what has no effect.

Read before torch is imported, so that mistakes answer at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import InputError
from utils.rules import Count, NonNegative, Positive, Range, Seed, broken_rule

Task = Literal["language", "vision"]
Share = Annotated[float, Range(0, 1, open_low=True)]
LOSSES = {"MMD+KL": "md+kd", "MMD": "md", "KL": "kd"}
MODELS = {"language": "bert", "vision": "vit"}
NAME = re.compile(r"[A-Za-z0-9]([\w./-]*[A-Za-z0-9])?", re.ASCII)
FLAG = "prune.published="


@dataclass(frozen=True)
class Key:
    """A key of the published configuration.

    Attributes:
        rule: What its value must be, as an annotation.
        task: The only task that has it; None: both have it.
        setting: Our key that takes its value as it is; None where it takes more than that.
        unless_false: A key that makes this one idle.
    """

    rule: Any
    task: Task | None = None
    setting: str | None = None
    unless_false: str | None = None


KEYS: Mapping[str, Key] = {
    "task_name": Key(Task),
    "dataset": Key(str),
    "model_name": Key(str),
    "batch_size": Key(Count, setting="data.calibration_batch_size"),
    "timer_batch_size": Key(Count, "language", "data.batch_size"),
    "val_batch_size": Key(Count, "vision", "data.batch_size"),
    "loss_type": Key(Literal["MMD+KL", "MMD", "KL"]),
    "lambda_contribution": Key(Positive),
    "mac_constraint": Key(Share),
    "seed": Key(Seed, setting="seed"),
    "fine_tune": Key(bool, "vision"),
    "temp": Key(Positive, setting="prune.temperature"),
    "aggregate": Key(Literal["sum", "mean"], setting="prune.aggregate"),
    "beta_config_only": Key(bool, "vision"),
    "head_include_fin_layer_mmd": Key(bool, setting="prune.head_final"),
    "neuron_include_fin_layer_mmd": Key(bool, setting="prune.neuron_final"),
    "head_fin_decay_bool": Key(bool),
    "head_fin_decay_val": Key(NonNegative, unless_false="head_fin_decay_bool"),
    "neuron_fin_decay_bool": Key(bool),
    "neuron_fin_decay_val": Key(NonNegative, unless_false="neuron_fin_decay_bool"),
    "head_metric_decay": Key(NonNegative, setting="prune.head_decay"),
    "neuron_metric_decay": Key(NonNegative, setting="prune.neuron_decay"),
    "patch_metric_decay": Key(NonNegative, "vision", "prune.token_decay"),
    "max_patch_evnvelope": Key(Positive, "vision", "prune.token_envelope"),
}
NO_EFFECT: Mapping[str, str] = {
    "logging": "every run is recorded",
    "embedding_choice": "the model says where its features are taken",
    "distill_token": "it has no effect in the published code either",
}


@dataclass(frozen=True)
class Published:
    """A published configuration in our terms.

    Attributes:
        path: The file.
        settings: Our keys and their values; `model`, `data`, `prune` and `recover` choose options.
        ignored: Keys of the file that change nothing, and why.
    """

    path: Path
    settings: Mapping[str, Any]
    ignored: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a reader should know of what was ignored, a line a key."""
        return [f"{self.path}: {key} is ignored: {why}" for key, why in self.ignored.items()]


def from_published(path: Path) -> Published:
    """Read a configuration file of the published code.

    It has no defaults, so that every key of a task must be there which has an effect.

    Raises:
        InputError: If the file can't be read, or with one line for each mistake.
    """
    found = _mapping(path)
    if problems := _problems(found):
        raise InputError("\n".join(f"{FLAG}{path}: {problem}" for problem in problems))
    return Published(path, _settings(found), _ignored(found))


def overrides(published: Published, given: Sequence[str] = ()) -> list[str]:
    """Hydra overrides for a published configuration.

    Args:
        published: The configuration.
        given: Overrides that win: what they set is left out. Where one chooses another
            model or other data, so are the settings of those that the file chose.
    """
    own, settings = dict(map(_split, given)), published.settings
    moved = {group for group in ("model", "data") if own.get(group, settings[group]) != settings[group]}
    kept = {key: value for key, value in settings.items() if key not in own and key.partition(".")[0] not in moved}
    return [f"{key}={_shown(value)}" for key, value in kept.items()]


def expanded(arguments: Sequence[str]) -> list[str]:
    """Put the overrides of `prune.published=<file>` into a command line, in front of it.

    Expanding twice changes nothing, so that a recorded command can be repeated.

    Args:
        arguments: The command line without the program's name.

    Raises:
        InputError: If more than one file is asked for, or it is wrong.
    """
    asked = [i for i, argument in enumerate(arguments) if argument.lstrip("+").startswith(FLAG)]
    files = [_split(arguments[i])[1] for i in asked]
    if not asked or files == ["null"]:
        return list(arguments)
    if len(asked) > 1:
        raise InputError(f"{FLAG}{files[-1]}: must be given once, is {len(asked)} times")
    at = asked[0]
    return [*arguments[:at], *overrides(from_published(Path(files[0])), arguments), *arguments[at:]]


def _mapping(path: Path) -> dict[str, Any]:
    """The file's keys and values, interpolations left as text."""
    if not path.is_file():
        raise InputError(f"{FLAG}{path}: must be an existing file")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"{FLAG}{path}: must be a YAML file ({why})") from error
    if not isinstance(found, dict):
        raise InputError(f"{FLAG}{path}: must hold keys and values; holds a {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def _problems(found: Mapping[str, Any]) -> list[str]:
    task = found.get("task_name")
    problems = []
    for name, key in KEYS.items():
        if key.task not in (None, task):
            continue
        if name not in found:
            needed = key.unless_false is None or found.get(key.unless_false) is not False
            problems += [f"{name}: no value given; a published configuration needs it"] if needed else []
        elif broken := _broken(name, found[name], key):
            problems.append(f"{name}={_brief(found[name])}: {broken}")
    return problems


def _broken(name: str, value: Any, key: Key) -> str | None:
    if broken := broken_rule(value, key.rule):
        return broken
    if name in ("dataset", "model_name") and not NAME.fullmatch(value):
        return "must be a name of letters, digits and ._/-"
    return None


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    task = found["task_name"]
    by_itself = {k.setting: _typed(found[n], k.rule) for n, k in KEYS.items() if k.setting and k.task in (None, task)}
    return {
        **_choices(found),
        "data.calibration_batches": 1,
        "prune.mode": "compat",
        # in decimals: 1 - 0.684 is 0.31599999999999995
        "prune.ratio": round(1 - found["mac_constraint"], 12),
        "prune.loss": LOSSES[found["loss_type"]],
        "prune.lambda_c": 1 / found["lambda_contribution"],
        "prune.last_head_decay": _last_decay(found, "head"),
        "prune.last_neuron_decay": _last_decay(found, "neuron"),
        **by_itself,
    }


def _typed(value: Any, rule: Any) -> Any:
    """Whole numbers as fractions where the rule is of one: a cached ranking tells 4 from 4.0."""
    return float(value) if rule in (Positive, NonNegative) else value


def _choices(found: Mapping[str, Any]) -> dict[str, Any]:
    """Model, data, method and recovery, by the names that they have here."""
    task, model = found["task_name"], found["model_name"]
    dataset = "".join(c for c in found["dataset"].lower() if c.isalnum())
    if task == "language":
        data = {"data": "glue", "data.task": dataset}
        return {"model": MODELS[task], "model.name": model, **data, "prune": "optin"}
    return {
        "model": MODELS[task],
        # the hub's name for transformers, such as facebook/deit-small-patch16-224, in timm's spelling
        "model.name": model.rpartition("/")[2].replace("-", "_"),
        "data": dataset,
        "prune": "optin" if found["beta_config_only"] else "optin_tau",
        "recover": "finetune" if found["fine_tune"] else "none",
    }


def _last_decay(found: Mapping[str, Any], kind: str) -> float:
    return float(found[f"{kind}_fin_decay_val"]) if found[f"{kind}_fin_decay_bool"] else 1.0


def _ignored(found: Mapping[str, Any]) -> dict[str, str]:
    return {name: why for name in found if (why := _why_ignored(name, found))}


def _why_ignored(name: str, found: Mapping[str, Any]) -> str | None:
    if name in NO_EFFECT:
        return NO_EFFECT[name]
    if name not in KEYS:
        return "not a key of the published configuration"
    key = KEYS[name]
    if key.task not in (None, found["task_name"]):
        return f"it has an effect with task_name={key.task} alone"
    if key.unless_false is not None and found[key.unless_false] is False:
        return f"{key.unless_false} is false"
    return None


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value.strip("'\"")


def _shown(value: Any) -> str:
    """A value in Hydra's grammar; text that reads as something else in quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    plain = not isinstance(value, str) or re.fullmatch(r"[A-Za-z][\w./+-]*", value, re.ASCII)
    reserved = isinstance(value, str) and value.lower() in ("true", "false", "null", "nan", "inf")
    return str(value) if plain and not reserved else f"'{value}'"


def _brief(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
