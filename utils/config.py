"""The typed root of the configuration, and the one place that turns nodes into objects."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig

from utils.errors import InputError, RunError
from utils.rules import Seed, WritableFolder


@dataclass
class Config:
    """Typed scalars; components stay `Any`, so that third-party keys are welcome."""

    name: str = MISSING
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    deterministic: bool = False
    storage: str = "storage"
    save: bool = False
    summary: bool = False
    joules: str = "counters"
    model: Any = MISSING
    data: Any = MISSING
    prune: Any = MISSING
    recover: Any = MISSING
    evals: Any = field(default_factory=dict)
    tracker: Any = field(default_factory=lambda: {"_target_": "evals.trackers.none.Nothing"})


ROOT_RULES: dict[str, Any] = {
    "name": str,
    "seed": Seed,
    "device": Literal["auto", "cpu", "cuda"],
    "dtype": Literal["auto", "float32", "bfloat16"],
    "deterministic": bool,
    "storage": WritableFolder,
    "save": bool,
    "summary": bool,
    "joules": Literal["counters", "estimate"],
}

ConfigStore.instance().store(name="root", node=Config)


def build(node: DictConfig | dict, needs: tuple[str, ...] = ()) -> Any:
    """Instantiate a `_target_` node; lists and mappings in it arrive as plain Python.

    Args:
        node: A node with a `_target_`.
        needs: Methods that the object must have.

    Raises:
        InputError: As the target raises it, or because it can't be built with these values.
        RunError: As the target raises it.
    """
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError | RunError):
            raise error.__cause__ from None
        raise InputError(f"{node['_target_']} cannot be built: {error.__cause__ or error}") from error
    if missing := [name for name in needs if not callable(getattr(built, name, None))]:
        raise InputError(
            f"{node['_target_']}: gives a {type(built).__name__} without {', '.join(missing)}; it needs them"
        )
    return built
