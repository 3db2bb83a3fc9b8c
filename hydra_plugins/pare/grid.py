"""A sweep over a grid: every job is launched, whatever becomes of the others."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from utils.files import REFUSALS
from utils.jobs import SWEEP_FILE, Job, jobs_of

RUN_FAILED = 1


class Grid(Sweeper):
    """Launches all jobs, where Hydra's own sweeper ends with a traceback after the first batch with a failed one."""

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
        """Launch every job; the sweep's file says what was asked for."""
        assert self.config is not None and self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / SWEEP_FILE)
        return launch_all(self.launcher, self.asked(arguments), self.max_batch_size, folder)

    def asked(self, arguments: list[str]) -> list[Job]:
        """The jobs of a command line and of the sweeper's own settings."""
        assert self.hydra_context is not None
        params = {str(key): str(value) for key, value in (self.params or {}).items()}
        return jobs_of(arguments, params, self.hydra_context.config_loader)


def launch_all(launcher: Launcher, jobs: Sequence[Sequence[str]], size: int | None, folder: Path) -> list[JobReturn]:
    """Launch jobs, `size` at a time (None: all at once).

    Errors of jobs are not raised: each job has said its own, and the sweep's table counts them. Where not even a job's
    folder can be written, the sweep ends with exit code 1.
    """
    size = size or max(1, len(jobs))
    returns: list[JobReturn] = []
    for start in range(0, len(jobs), size):
        batch = [list(job) for job in jobs[start : start + size]]
        try:
            returns += launcher.launch(batch, initial_job_idx=start)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            print(f"{error.filename or folder}: cannot be written ({error.strerror}); the sweep ends", file=sys.stderr)
            sys.exit(RUN_FAILED)
    return returns
