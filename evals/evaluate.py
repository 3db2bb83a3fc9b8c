"""Measuring all models of a comparison through the same code."""

from collections.abc import Iterator, Mapping, Sequence

from data.base import DataBundle
from evals.base import Measurements, Metric, Subject
from models.base import PrunableModel
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
        One mapping of measurements per model.
    """
    dense, *pruned = models
    subjects = [Subject(dense, data, store), *(Subject(model, data) for model in pruned)]
    for metric in metrics.values():
        with random_state_restored():
            yield metric.measure(subjects)
