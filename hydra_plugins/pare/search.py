"""A search over jobs with Optuna: Hydra's own sweeper for it, in a folder that can be taken up again."""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.pare.resume import in_its_folder
from utils.jobs import SWEEP_FILE, Numbered, is_done, job_folders, started_jobs

log = logging.getLogger(__name__)


class Search(Sweeper):
    """Chooses jobs by what earlier ones gave; `n_trials` counts the jobs of the sweep's folder."""

    def __init__(self, objectives: list[str], **settings: Any) -> None:
        """Take the names of the objectives, which jobs return in this order, and the settings of Hydra's sweeper."""
        self.settings = settings
        self.sweeper: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build Hydra's sweeper, and through it the launcher."""
        # its other modules are scanned at every start; this one imports Optuna
        plugin: Any = import_module("hydra_plugins.hydra_optuna_sweeper._impl")

        self.loader, self.config = hydra_context.config_loader, config
        self.folder = Path(config.hydra.sweep.dir)
        self.sweeper = plugin.OptunaSweeperImpl(**self.settings)
        self.sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Do again what has no good result, then search on until the folder holds `n_trials` jobs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SWEEP_FILE).exists():
            OmegaConf.save(self.config, self.folder / SWEEP_FILE)
        study = self._study()
        if study.trials:
            self._draw_anew()
        if done := job_folders(self.folder):
            end_running(study)
            self._do_again(study)
            self.sweeper.job_idx = int(done[-1].name) + 1
            self.sweeper.n_trials = max(0, self.sweeper.n_trials - len(done))
            log.info("%d jobs were there, %d follow", len(done), self.sweeper.n_trials)
        if self.sweeper.n_trials:
            self._search(arguments)

    def _study(self) -> Any:
        optuna: Any = import_module("optuna")
        return optuna.create_study(
            study_name=self.sweeper.study_name,
            storage=self.sweeper.storage,
            directions=self.sweeper._get_directions(),
            load_if_exists=True,
        )

    def _draw_anew(self) -> None:
        """A sampler's seed would give a study that goes on the first trials once more."""
        samplers: Any = import_module("optuna.samplers")
        if isinstance(self.sweeper.sampler, samplers.BaseSampler):
            self.sweeper.sampler.reseed_rng()

    def _search(self, arguments: list[str]) -> None:
        try:
            self.sweeper.sweep(arguments)
        except ValueError as error:
            # asking a study of failed trials alone for its best one
            if any(trial.values for trial in self._study().trials):
                raise
            log.error("no job gave its objectives: %s", error)

    def _do_again(self, study: Any) -> None:
        """Launch the jobs without a good result in their folders, and tell the study what they give."""
        todo = [job for job in started_jobs(self.folder, self.loader) if not is_done(self.folder / str(job.number))]
        if not todo:
            return
        returns = self.sweeper.launcher.launch([in_its_folder(job) for job in todo], initial_job_idx=0)
        for job, found in zip(todo, returns, strict=True):
            if found.status is JobStatus.COMPLETED:
                tell(study, job, found.return_value)


def end_running(study: Any) -> None:
    """Call the trials failed that a killed search left running."""
    states: Any = import_module("optuna.trial").TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)


def tell(study: Any, job: Numbered, values: Sequence[float]) -> None:
    """Add a job that was done again to the study, unless its figures are known."""
    trials: Any = import_module("optuna.trial")
    own = set(job.overrides)
    same = [t for t in study.trials if t.params and {f"{name}={value}" for name, value in t.params.items()} <= own]
    if same and not any(trial.state is trials.TrialState.COMPLETE for trial in same):
        known = same[0]
        again = trials.create_trial(params=known.params, distributions=known.distributions, values=list(values))
        study.add_trial(again)
