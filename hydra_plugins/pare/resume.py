"""A sweep taken up again: only the jobs without a good result, each in the folder that it has."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.pare.grid import launch_all
from utils.jobs import Numbered, jobs_of, missing

log = logging.getLogger(__name__)


def in_its_folder(job: Numbered) -> list[str]:
    """A job's overrides with one that names its folder, since launchers number jobs anew."""
    return [*job.overrides, f"hydra.sweep.subdir='{job.number}'"]


class Missing(Sweeper):
    """Launches what is missing of the sweep in `hydra.sweep.dir`; the jobs are matched by their overrides."""

    def __init__(self, max_batch_size: int | None, params: DictConfig | None) -> None:
        """Take the settings of Hydra's basic sweeper."""
        self.max_batch_size, self.params = max_batch_size, params
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the missing jobs."""
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        params = {str(key): str(value) for key, value in (self.params or {}).items()}
        asked = jobs_of(arguments, params, loader)
        folder = Path(self.config.hydra.sweep.dir)
        todo = missing(asked, folder, loader)
        log.info("%d of %d jobs are done; the rest follows", len(asked) - len(todo), len(asked))
        return launch_all(self.launcher, [in_its_folder(job) for job in todo], self.max_batch_size, folder)
