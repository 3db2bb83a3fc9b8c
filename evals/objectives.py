"""What a search over jobs goes by: a few of a run's figures, as plain numbers."""

from collections.abc import Sequence

from omegaconf import DictConfig

from evals.base import Measurements
from evals.report import Record
from utils.errors import RunError


def objectives(record: Record, sweeper: DictConfig) -> tuple[float, ...] | None:
    """The figures of the pruned model that Hydra's sweeper names; None where it names none, as it searches nothing.

    Raises:
        RunError: If one of them was not measured.
    """
    names = sweeper.get("objectives")
    return None if names is None else figures(record.pruned, list(names))


def figures(measured: Measurements, names: Sequence[str]) -> tuple[float, ...]:
    """Values by name.

    Raises:
        RunError: If one of them was not measured.
    """
    for name in names:
        if name not in measured:
            rule = f"must be among what was measured: {', '.join(sorted(measured))}"
            raise RunError(f"hydra.sweeper.objectives: {name!r} {rule}")
        if measured[name].value is None:
            raise RunError(f"hydra.sweeper.objectives: {name!r} has no value: {measured[name].reason}")
    return tuple(float(measured[name].value or 0.0) for name in names)
