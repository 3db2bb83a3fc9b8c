"""A fresh process a job on this machine: Hydra's own submitit launcher, whose jobs end with the sweep."""

import os
import signal
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# what submitit starts beside each job; on SIGINT it interrupts the job, and kills it if that does not help
BESIDE = b"submitit.local._local"
PATIENCE_S = 60.0


class LocalJobs(Launcher):
    """Launches jobs through submitit; a sweep that is stopped stops them, where submitit would let them go on."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of Hydra's launcher."""
        self.settings = settings
        self.launcher: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build Hydra's launcher."""
        plugin: Any = import_module("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
        self.launcher = plugin.LocalLauncher(**self.settings)
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and interrupt them where the sweep is."""
        try:
            return self.launcher.launch(job_overrides, initial_job_idx)
        except (KeyboardInterrupt, SystemExit):
            for pid in beside_jobs():
                os.kill(pid, signal.SIGINT)
            _await_end()
            raise


def beside_jobs() -> list[int]:
    """The processes that submitit started from this one and that still run; none where there is no /proc."""
    found = []
    for thread in Path("/proc/self/task").glob("*/children"):
        for child in thread.read_text().split():
            try:
                if BESIDE in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
            except OSError:
                continue
    return found


def _await_end() -> None:
    """Wait for the jobs, so that the table that follows holds what they left."""
    until = time.monotonic() + PATIENCE_S
    while beside_jobs() and time.monotonic() < until:
        time.sleep(0.1)
