"""A run's configuration from an ordinary dictionary: the same keys and the same check as on the command line."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from utils.compose import CANNOT_COMPOSE, CommandLine, command_line_problems
from utils.errors import InputError

PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
WORDS = ("true", "false", "null", "nan", "inf")


def configured(
    values: Mapping[str, Any], config_dir: Path, expand: Callable[[Sequence[str]], list[str]] = list
) -> tuple[DictConfig, str]:
    """Compose and check one run's configuration.

    Args:
        values: Keys as on the command line, such as `{"prune": "optin", "prune.ratio": 0.4}`; `experiment` needs no
            plus, and `{"prune": {"ratio": 0.4}}` is the same as `{"prune.ratio": 0.4}`.
        config_dir: Where the configuration groups lie.
        expand: Puts overrides into the list that one of them stands for.

    Returns:
        The configuration, and the command that gives the same.

    Raises:
        InputError: With every mistake, a line each.
    """
    overrides = expand(overrides_of(values))
    line = CommandLine(config_dir, overrides=overrides)
    if problems := command_line_problems(line):
        raise InputError("\n".join(problems))
    with initialize_config_dir(str(config_dir.absolute()), version_base="1.3"):
        try:
            cfg = compose(line.config_name, overrides)
        except CANNOT_COMPOSE as error:
            raise InputError(str(error)) from error
    return cfg, shlex.join(["python", "main.py", *overrides])


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """A dictionary as overrides in Hydra's grammar.

    Raises:
        InputError: If a key or value is none that a configuration can hold.
    """
    found = []
    for key, value in _flat(values):
        name = key.lstrip("+~")
        if name.split(".")[0] == "hydra":
            raise InputError(f"{key}: belongs to the command line; out= says where a run leaves its files")
        if key.startswith("~"):
            found.append(key if value is None else f"{key}={written(key, value)}")
        else:
            found.append(f"{'+experiment' if key == 'experiment' else key}={written(key, value)}")
    return found


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values, one level of a group's own dictionary taken apart."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise InputError(f"{key!r}: must be a key of the configuration, such as 'prune.ratio'")
        inner = isinstance(value, Mapping | DictConfig) and "." not in key and key.isidentifier()
        pairs += [(f"{key}.{name}", part) for name, part in value.items()] if inner else [(key, value)]  # type: ignore[union-attr]
    return pairs


def written(key: str, value: Any) -> str:
    """A value as it is typed on the command line.

    Raises:
        InputError: If it is no plain value.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(written(key, part) for part in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}: {written(key, part)}" for name, part in value.items()) + "}"
    raise InputError(f"{key}={value!r}: must be text, a number, true, false, null, or a list or mapping of them")


def _text(value: str) -> str:
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    # a backslash counts only before a quote
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def dated_folder(root: Path = Path("outputs")) -> Path:
    """A folder of the present moment, as a run on the command line gets one."""
    return root / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
