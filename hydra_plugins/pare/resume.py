"""A sweep taken up again: only the jobs without a good result, each in the folder that it has."""

import logging
from pathlib import Path
from typing import Any

from hydra_plugins.pare.grid import Grid, launch_all
from utils.jobs import Numbered, missing

log = logging.getLogger(__name__)


def in_its_folder(job: Numbered) -> list[str]:
    """A job's overrides with one that names its folder, since launchers number jobs anew."""
    return [*job.overrides, f"hydra.sweep.subdir='{job.number}'"]


class Missing(Grid):
    """Launches what is missing of the sweep in `hydra.sweep.dir`; the jobs are matched by their overrides."""

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the missing jobs."""
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        asked, folder = self.asked(arguments), Path(self.config.hydra.sweep.dir)
        todo = missing(asked, folder, self.hydra_context.config_loader)
        log.info("%d of %d jobs are done; the rest follows", len(asked) - len(todo), len(asked))
        return launch_all(self.launcher, [in_its_folder(job) for job in todo], self.max_batch_size, folder)
