"""Composing the many jobs of one sweep: what they share is read, and put together, once.

Exactly what Hydra makes of each job by itself: it, too, composes the chosen options first and then sets single values
in their order.
"""

import os
import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

NOT_PICKLED = (pickle.PicklingError, TypeError, AttributeError)


class KeptRepository(ConfigRepository):
    """Hydra's configuration sources, each entry read once; every asking gets a copy of its own.

    Hydra copies its repository, with all that is registered in this process, for each composition and each look at
    what a group offers. A configuration folder does not change while one command composes.
    """

    def __init__(self, sources: Sequence[ConfigSource], kept: dict[tuple[Any, ...], Any] | None = None) -> None:
        self.sources = list(sources)
        self.kept = {} if kept is None else kept

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Read an entry, the first time it is asked for."""
        key = ("entry", *self._places(), config_path)
        if key not in self.kept:
            found = super().load_config(config_path)
            try:
                self.kept[key] = pickle.dumps(found, pickle.HIGHEST_PROTOCOL)
            except NOT_PICKLED:  # somebody's own node
                return found
        return pickle.loads(self.kept[key])

    def group_exists(self, config_path: str) -> bool:
        """Whether there is such a group."""
        key = ("group", *self._places(), config_path)
        if key not in self.kept:
            self.kept[key] = super().group_exists(config_path)
        return self.kept[key]

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        """What a group offers."""
        key = ("options", *self._places(), group_name, results_filter)
        if key not in self.kept:
            self.kept[key] = super().get_group_options(group_name, results_filter)
        return list(self.kept[key])

    def _places(self) -> list[tuple[str, str]]:
        return [(source.provider, source.path) for source in self.sources]

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptRepository":
        """A repository that may look elsewhere, and knows what this one has read."""
        return KeptRepository(self.sources, self.kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was read: a launcher that sends jobs elsewhere sends the loader with each."""
        return KeptRepository, (self.sources,)


def read_once(loader: ConfigLoader) -> None:
    """Let a loader read each of its sources' entries once, from now on."""
    if isinstance(loader, ConfigLoaderImpl) and type(loader.repository) is ConfigRepository:
        loader.repository = KeptRepository(loader.repository.sources)


class ComposedOnce:
    """Stands in for a loader's `load_sweep_config`: jobs that choose the same options share what these give.

    Only single values are set job by job. Nothing of a single job is kept, of which a sweep may have thousands.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self.shared: dict[tuple[str, ...], bytes] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose a job's configuration."""
        return self._shared(master_config, sweep_overrides) or self._whole(master_config, sweep_overrides)

    def _whole(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """As Hydra does it, which also says best what is wrong."""
        return type(self.loader).load_sweep_config(self.loader, master, overrides)

    def _shared(self, master: DictConfig, overrides: list[str]) -> DictConfig | None:
        """The same from the options that other jobs chose as well; None where that can't be done."""
        if not isinstance(self.loader, ConfigLoaderImpl):
            return None
        name, fixed = master.hydra.job.config_name, list(master.hydra.overrides.hydra)
        parsed, repository = self.loader._parse_overrides_and_create_caching_repo(name, [*fixed, *overrides])
        if any(override.is_sweep_override() for override in parsed):
            return None
        own = [o for o in parsed if not o.is_hydra_override()]
        values = [o for o in own if isinstance(o.value(), dict) or not repository.group_exists(o.key_or_group)]
        rest = tuple(o.input_line or "" for o in parsed if all(o is not value for value in values))
        try:
            if rest not in self.shared:
                found = self.loader.load_configuration(name, [*rest], RunMode.RUN)
                self.shared[rest] = pickle.dumps(found, pickle.HIGHEST_PROTOCOL)
            cfg: DictConfig = pickle.loads(self.shared[rest])
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        except Exception:  # Hydra's own way comes next, and says what is wrong
            return None
        _note_job(cfg, own)
        OmegaConf.copy_cache(from_config=master, to_config=cfg)
        return cfg

    def __getstate__(self) -> dict[str, Any]:
        """Without the configurations: a launcher that sends jobs elsewhere sends the loader with each."""
        return {"loader": self.loader, "shared": {}}


def _note_job(cfg: DictConfig, own: Sequence[Override]) -> None:
    """What Hydra's part of a configuration says of the job itself, as Hydra's loader writes it."""
    hydra = cfg.hydra
    hydra.overrides.task = [override.input_line for override in own]
    for key in hydra.job.env_copy:
        hydra.job.env_set[key] = os.environ[key]
    hydra.runtime.cwd = os.getcwd()
    how = hydra.job.config.override_dirname
    hydra.job.override_dirname = get_overrides_dirname(list(own), list(how.exclude_keys), how.item_sep, how.kv_sep)
