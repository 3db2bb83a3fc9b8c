"""Measuring all models of a comparison through the same code."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from data.base import DataBundle
from evals.base import Measurement, Measurements, Metric, Subject
from evals.comparable import refuse_incomparable
from models.base import PrunableModel
from utils.distributed import from_first, is_first, world_size
from utils.seed import random_state_restored
from utils.storage import Store


def evaluate(
    models: Sequence[PrunableModel], data: DataBundle, metrics: Mapping[str, Metric], store: Store | None = None
) -> Iterator[list[Measurements]]:
    """Run each metric over all models; yields metric by metric, so that none loses the others' work.

    Args:
        models: The dense model first, then what is compared with it.
        data: Source of the validation samples.
        metrics: The chosen metrics by name.
        store: Keeps the dense model's predictions, which every job of a sweep needs.

    Yields:
        One mapping of measurements per model, each with how it was measured.

    Raises:
        InputError: If the models answer with different class heads.
    """
    dense, *pruned = models
    subjects = [Subject(dense, data, store), *(Subject(model, data) for model in pruned)]
    refuse_incomparable(subjects)
    for metric in metrics.values():
        with random_state_restored():
            found = _absent(metric, subjects) or _measured(metric, subjects)
        yield [described(of_model, metric) for of_model in found]


def _measured(metric: Metric, subjects: Sequence[Subject]) -> list[Measurements]:
    """Measure with all processes of a run where a metric divides its work, else with the first one alone.

    The others wait without a load on the machine, which would disturb what a clock tells.
    """
    if (size := world_size()) == 1:
        return metric.measure(subjects)
    if getattr(metric, "divides", False):
        return [_by(found, f"{size} processes") for found in metric.measure(subjects)]
    found: list[Measurements] = [{} for _ in subjects]
    if is_first():
        found = metric.measure([subject.alone() for subject in subjects])
    from_first(lambda: ({}, None))
    return [_by(of_model, f"1 of {size} processes, the others waiting") for of_model in found]


def _by(found: Measurements, who: str) -> Measurements:
    return {name: replace(m, details={**m.details, "measured_by": who}) for name, m in found.items()}


def _absent(metric: Metric, subjects: Sequence[Subject]) -> list[Measurements] | None:
    """What a metric of a model on the device has no value for while blocks come and go; None where it has."""
    figures: Mapping[str, str] = getattr(metric, "resident_only", {})
    if not figures or all(subject.model.visited is None for subject in subjects):
        return None
    reason = "blocks visit the device one by one (prune.offload=true), so that this would be a figure of moving them"
    return [{name: Measurement(None, unit, reason) for name, unit in figures.items()} for _ in subjects]


def described(found: Measurements, metric: Metric) -> Measurements:
    """Let each measurement say how it was made: where it does not, by the first line of the metric's description."""
    words = (inspect.getdoc(metric) or "").partition("\n")[0]
    return {name: m if m.how else replace(m, how=words) for name, m in found.items()}
