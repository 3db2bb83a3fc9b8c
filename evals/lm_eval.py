"""Tasks of the Language Model Evaluation Harness (EleutherAI), run in memory on the models at hand."""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from data.base import DataBundle
from evals.base import Measurement, Measurements, Subject
from models.base import PrunableModel
from models.decoding import Decoding
from utils.check import suggest
from utils.errors import InputError, RunError
from utils.rules import Count, ExistingPath, Seed, check_fields

INSTALL = "evals=[lm_eval] needs lm_eval: pip install -r requirements-lm_eval.txt"
UNITS = {
    "perplexity": "per token", "word_perplexity": "per word", "byte_perplexity": "per byte",
    "bits_per_byte": "bit/byte",
}  # fmt: skip
COMMON: Mapping[str, Any] = dict.fromkeys(
    ("lambada_openai", "hellaswag", "arc_challenge", "piqa", "winogrande", "boolq"), 0
)
FRACTIONS = ("acc", "exact_match", "f1", "em", "mcc", "contains")


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Every metric of the chosen tasks as `lm_eval_<task>_<metric>`, with its standard error and the task's version.

    Each task runs by itself with its own number of shots, so that no task's number acts on another's. A number that
    the task does not honour ends the run.

    Attributes:
        tasks: Task or group names with their shots, null shots for the task's own; None: six common ones, 0 shots.
        include: Folder of task files (yaml) beside those of the harness.
        limit: Samples a task at most, for trying; None: all.
        batch: Sequences in a forward pass.
        seed: Of drawing the shots.
    """

    tasks: Mapping[str, Any] | None = None
    include: ExistingPath | None = None
    limit: Count | None = None
    batch: Count = 8
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tasks is not None and not self.tasks:
            raise InputError("evals.lm_eval.tasks={}: must name at least one task, such as {hellaswag: 0}")
        for name, shots in self.chosen.items():
            if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
                raise InputError(f"evals.lm_eval.tasks.{name}={shots}: must be a number of shots, 0 or more, or null")
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError(INSTALL)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Tasks with their shots."""
        return COMMON if self.tasks is None else self.tasks

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse, before any work, tasks that are unknown or whose data can't be had (InputError)."""
        if why_not_readable(model) is not None:
            return
        with quietly():
            manager = self._manager()
            for name in self.chosen:
                if name not in manager.all_tasks:
                    raise InputError(f"evals.lm_eval.tasks: {name!r} is unknown; {_close(name, manager.all_tasks)}")
                try:
                    manager.load([name])
                except Exception as error:  # a missing data set raises whatever its loader does
                    raise InputError(
                        f"evals.lm_eval.tasks: {name!r} cannot be loaded: {_first_line(error)}; its data must be in "
                        "the hub's cache or within reach, or the task a local one by evals.lm_eval.include=<folder>"
                    ) from error

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Run all tasks on each model."""
        if reason := why_not_readable(subjects[0].model):
            return [{f"lm_eval_{name}": Measurement(None, "", reason) for name in self.chosen} for _ in subjects]
        with quietly():
            manager = self._manager()
            return [self._of(subject.model, manager) for subject in subjects]

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

        if self.include is not None:  # the harness's own task files are thousands, and take seconds to look through
            own = TaskManager(include_path=self.include, include_defaults=False)
            if set(self.chosen) <= set(own.all_tasks):
                return own
        return TaskManager(include_path=self.include)

    def _of(self, model: PrunableModel, manager: Any) -> Measurements:
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

        # the harness gives its tokenizer a padding token
        tokenizer = copy.deepcopy(model.preprocessing.tokenizer)
        reader = HFLM(
            pretrained=model.network,  # type: ignore[arg-type]
            tokenizer=tokenizer, batch_size=self.batch, max_length=model.context,  # type: ignore[attr-defined]
        )  # fmt: skip
        found: Measurements = {}
        for name, shots in self.chosen.items():
            found |= self._task(reader, manager, name, shots)
        return found

    def _task(self, reader: Any, manager: Any, name: str, shots: int | None) -> Measurements:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]

        seeds = {f"{kind}_seed": self.seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
        results: Any = simple_evaluate(
            reader, tasks=[name], num_fewshot=shots, task_manager=manager, limit=self.limit, log_samples=False, **seeds
        )
        used = results["n-shot"]
        if wrong := {task: n for task, n in used.items() if shots is not None and n != shots}:
            raise RunError(f"evals.lm_eval.tasks.{name}={shots}: lm_eval used other shots: {wrong}; choose null")
        return measurements(name, results, {"lm_eval": version("lm_eval"), "limit": self.limit, "seed": self.seed})


def measurements(task: str, results: Mapping[str, Any], facts: Mapping[str, Any]) -> Measurements:
    """What the harness found on one task (or group), a measurement for each metric and filter."""
    row: Mapping[str, Any] = results["results"][task]
    details = {
        "task": task, "version": results["versions"].get(task), "shots": results["n-shot"].get(task),
        "samples": (results.get("n-samples", {}).get(task) or {}).get("effective"), **facts,
    }  # fmt: skip
    found: Measurements = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        name = f"lm_eval_{task}_{metric}" + ("" if kind == "none" else f"_{kind}")
        spread = {"standard_error": error if isinstance(error, int | float) else None}
        found[name] = Measurement(float(value), unit_of(metric), details={**details, **spread})
    return found


def unit_of(metric: str) -> str:
    """The unit of one of the harness's metrics; its name where nothing better is known."""
    return UNITS.get(metric) or ("fraction" if metric.startswith(FRACTIONS) else metric)


def why_not_readable(model: PrunableModel) -> str | None:
    """Why the harness can't run on a model; None if it can."""
    if not isinstance(model, Decoding):
        return f"model={model.name} is no causal language model"
    return None if model.preprocessing is not None else f"model={model.name} has no tokenizer"


@contextmanager
def quietly() -> Iterator[None]:
    """A block in which the harness keeps its warnings to itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _close(name: str, known: Sequence[str]) -> str:
    alike = [other for other in known if other.startswith(name[:4])]
    return suggest(name, alike[:20] or list(known)[:20])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
