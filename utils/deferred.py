"""Settings that only a swept choice has: `-m recover=lora,finetune recover.epochs=1`.

Hydra composes a sweep's own configuration without the choices that are swept, and refuses a key that only one of these
has. As a sweep of one value the setting waits for the jobs.
"""

from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig


def deferred(overrides: Sequence[str], config_name: str, loader: ConfigLoader) -> dict[str, str]:
    """What to say instead of settings that the sweep's own configuration has no place for.

    Args:
        overrides: As typed, without mistakes; `hydra.searchpath` among them says where options lie.
        config_name: Of the configuration that they change.
        loader: Knows groups and their options.

    Returns:
        The same as a sweep of one value, by what was typed; empty where all have their place.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    chosen = [o for o in parsed if o.is_hydra_override() or loader.get_group_options(o.key_or_group)]
    if not any(override.is_sweep_override() for override in chosen):
        return {}
    own = loader.load_configuration(config_name, [o.input_line or "" for o in chosen], RunMode.MULTIRUN)
    settings = (override for override in parsed if override not in chosen and _can_wait(override))
    return {
        override.input_line: _waiting(override, override.input_line)
        for override in settings
        if override.input_line is not None and not _has(own, override.key_or_group)
    }


def _waiting(override: Override, typed: str) -> str:
    # Hydra's choice() takes no null, and its answers lose quotes
    if override.value() is None or isinstance(override._value, QuotedString):
        return f"++{typed}"
    return f"{override.key_or_group}=choice({typed.partition('=')[2]})"


def _can_wait(override: Override) -> bool:
    """Whether a setting changes one key to one value."""
    plain = not (override.is_add() or override.is_force_add() or override.is_delete())
    return plain and not override.is_sweep_override() and (override.input_line or "").partition("=")[2].strip() != ""


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a configuration has a key, of whatever value."""
    *path, last = key.split(".")
    for part in path:
        found = cfg.get(part) if part in cfg else None
        if not isinstance(found, DictConfig):
            return False
        cfg = found
    return last in cfg
