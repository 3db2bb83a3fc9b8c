"""The noun every data source produces, and the tasks it can be for."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from evals.scores import f1, matthews, standard_error
from utils.errors import InputError
from utils.storage import Store
from utils.training import TrainBatches

if TYPE_CHECKING:
    from models.base import PrunableModel

Batch = dict[str, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Predictions = Iterable[tuple[Tensor, Batch]]


@dataclass(frozen=True)
class Figure:
    """One of a task's metrics: a fraction, a correlation or what `unit` says, or None with a reason."""

    value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    unit: str = "fraction"


class Task(Protocol):
    """What a model's outputs are for."""

    @property
    def name(self) -> str:
        """What the task is called."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Tensors of a batch that scoring needs beside the logits; the others need not be kept."""
        ...

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch, a scalar in float32."""
        ...

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """The task's own metrics over a whole split, the one to quote first."""
        ...

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What training curves show beside the loss: per name one value a sample, (B,)."""
        ...

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far a student's logits are from a teacher's, averaged over samples, a scalar."""
        ...

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """How far each sample's logits are from those wanted: `KL(softmax(wanted) || softmax(given))`.

        Args:
            given: (..., B, *) for any leading dimensions.
            wanted: (B, *).
            batch: What they are answers to; padding does not count.

        Returns:
            (..., B), float32.
        """
        ...

    def misfit(self, logits: Tensor) -> str | None:
        """Say why logits of this shape can't be scored on this task, or None."""
        ...


@runtime_checkable
class Distributing(Protocol):
    """A task whose answers are distributions, compared by their KL."""

    def distributions(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits with the outcomes last, (B, ..., outcomes); minus infinity where there is only padding."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A task whose answers are distributions of several kinds, which draws a probe of their divergence itself."""

    def probe(self, logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """A scalar `<xi, logits>` with a random xi whose covariance is the Hessian of `deviation`, summed over samples.

        The mean square of its derivative along any direction is then twice the deviation that direction leads to,
        to second order.
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """A task whose loss is a mean, so that a batch's is made of its parts'."""

    def weight(self, batch: Batch) -> int:
        """Over how many things the loss of a batch is the mean."""
        ...


@runtime_checkable
class Scored(Protocol):
    """A task that knows ahead by what it is scored."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its `figures`, the one to quote first."""
        ...


@runtime_checkable
class Particular(Protocol):
    """A task whose figures compare only where they were taken in the same way."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """That way as plain values: `protocol` and `token_hash`."""
        ...


@runtime_checkable
class Condensing(Protocol):
    """A task whose logits are too large to keep: what scoring needs of a batch is taken from them at once."""

    def condensed(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `figures` and `mean_loss` are given in the logits' place, (B, ...) in float32."""
        ...

    def mean_loss(self, predictions: Predictions) -> float:
        """Mean loss over a whole split."""
        ...


@dataclass(frozen=True)
class Classification:
    """One label out of `classes` per sample: logits (B, C), labels (B,).

    Attributes:
        classes: Number of labels, C.
        name: What the task is called.
        metrics: Which of `accuracy`, `f1` and `matthews` it is scored by.
    """

    classes: int
    name: str = "classification"
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def targets(self) -> tuple[str, ...]:
        """The labels."""
        return ("labels",)

    def loss(self, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats."""
        return cross_entropy(logits.float(), batch["labels"], label_smoothing=label_smoothing)

    def weight(self, batch: Batch) -> int:
        """Its samples."""
        return len(batch["labels"])

    def figures(self, predictions: Predictions) -> dict[str, Figure]:
        """The task's metrics; accuracy with its standard error and the chance level."""
        pairs = [(logits.argmax(dim=-1).cpu(), batch["labels"].cpu()) for logits, batch in predictions]
        answers, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        scores: dict[str, Callable[[Tensor, Tensor], float | None]] = {"f1": f1, "matthews": matthews}
        found = {name: Figure(scores[name](answers, labels)) for name in self.metrics if name != "accuracy"}
        share, count = float((answers == labels).double().mean()), len(labels)
        details = {"standard_error": standard_error(share, count), "samples": count, "chance": 1 / self.classes}
        return {name: found.get(name, Figure(share, details)) for name in self.metrics}

    def quality(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy: 1 for a correct sample, 0 for another."""
        return {"accuracy": (logits.argmax(dim=-1) == batch["labels"]).float()}

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` (Hinton et al., 2015, arXiv:1503.02531)."""
        wanted, given = (log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher, student))
        return temperature**2 * kl_div(given, wanted, log_target=True, reduction="batchmean")

    def deviation(self, given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """KL of each sample's labels, (..., B)."""
        return divergences(given, wanted)

    def distributions(self, logits: Tensor, batch: Batch) -> Tensor:
        """The logits as they are, one distribution a sample."""
        return logits

    def misfit(self, logits: Tensor) -> str | None:
        """Refuse a head of another width: scoring it would mix two label spaces."""
        if logits.ndim == 2 and logits.shape[1] == self.classes:
            return None
        shape = ", ".join(["B", *map(str, logits.shape[1:])])
        return f"the model's logits have shape ({shape}), the data has {self.classes} classes"


def divergences(given: Tensor, wanted: Tensor, dim: int = -1) -> Tensor:
    """`KL(softmax(wanted) || softmax(given))` along one dimension, which goes."""
    new, old = (log_softmax(logits.float(), dim=dim) for logits in (given, wanted))
    # positions that cannot win have probability 0 on both sides, and 0 * (inf - inf) is none
    gap = torch.where(old.isneginf(), 0.0, old - new)
    return (old.exp() * gap).sum(dim=dim)


def divergence_probe(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers with the covariance of the logits' Fisher information, `diag(p) - p p^T` along the last dimension.

    Args:
        probabilities: p, (..., outcomes).
        generator: Source of the signs.

    Returns:
        `sqrt(p) e - p <sqrt(p), e>` for random signs e, shaped as p.
    """
    root = probabilities.sqrt() * random_signs(probabilities, generator)
    return root - probabilities * root.sum(dim=-1, keepdim=True)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Plus or minus one for each number of a tensor, on its device."""
    return (torch.randint(0, 2, tuple(like.shape), generator=generator).float() * 2 - 1).to(like.device)


@dataclass(frozen=True)
class DataBundle:
    """Everything a run needs of a data set.

    Attributes:
        name: Short name for folders and reports.
        domain: `vision`, `language` or `synthetic`; the first folder under storage.
        task: How outputs are scored.
        calibration: Batches that scores may look at; never of the validation split.
        train: Training batches; each iteration is the epoch that was set.
        train_samples: Samples in one epoch.
        validation: Validation batches, always in the same order.
        example: One sample at the length that costs are stated for.
        fingerprints: Hash of the content and settings of `train`, `calibration` and
            `validation`, apart: another calibration sample does not retrain a model.
        notes: What a reader should know of how it was made; shown above the numbers.
    """

    name: str
    domain: str
    task: Task
    calibration: Sequence[Batch]
    train: TrainBatches
    train_samples: int
    validation: Iterable[Batch]
    example: Batch
    fingerprints: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of all three parts."""
        return fingerprint_of(*(self.fingerprints[part] for part in sorted(self.fingerprints)))


class DataSource(Protocol):
    """Data that takes its form from the model: its tokenizer, its image size and transforms."""

    def prepare(self, model: "PrunableModel") -> DataBundle:
        """Make the bundle that this model reads.

        Raises:
            InputError: If the model has no preprocessing of the kind.
        """
        ...


@runtime_checkable
class Storing(Protocol):
    """A source that keeps what takes long to make of its data."""

    def prepare_in(self, model: "PrunableModel", store: Store | None) -> DataBundle:
        """The same as `prepare`, with what lies in storage already not made again."""
        ...


def prepared(source: DataBundle | DataSource, model: "PrunableModel", store: Store | None = None) -> DataBundle:
    """What `data=` built, in the form that the model reads.

    Args:
        source: The bundle itself, or what makes it.
        model: The model that reads it.
        store: Where a source may keep what takes long to make.
    """
    if isinstance(source, DataBundle):
        return source
    return source.prepare_in(model, store) if isinstance(source, Storing) else source.prepare(model)


@runtime_checkable
class Divisible(Protocol):
    """Training batches of which a part can be held out."""

    def divided(self, share: float, seed: int) -> tuple[TrainBatches, TrainBatches]:
        """Batches of all samples but a share, and batches of that share; each sample is in one of them."""
        ...


def divided_rows(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `round(share * count)` of the rows, at least one and never all; the others come first, both ascending."""
    held = min(max(round(share * count), 1), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


class TensorBatches:
    """Batches over tensors in memory, shuffled and augmented anew each epoch if a seed is given.

    Epoch k of one seed is always the same, whatever was drawn before.
    """

    def __init__(
        self, tensors: Batch, batch_size: int, shuffle_seed: int | None = None, augment: Augment | None = None
    ) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self.shuffle_seed, self.augment = shuffle_seed, augment
        self.samples = len(next(iter(tensors.values())))
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = self.samples
        shuffled = self.shuffle_seed is not None
        generator = torch.Generator().manual_seed(1_000_003 * (self.shuffle_seed or 0) + self.epoch)
        order = torch.randperm(count, generator=generator) if shuffled else torch.arange(count)
        for rows in order.split(self.batch_size):
            batch = {name: tensor[rows] for name, tensor in self.tensors.items()}
            if self.augment is not None:
                batch["inputs"] = self.augment(batch["inputs"], generator)
            yield batch

    def divided(self, share: float, seed: int) -> tuple["TensorBatches", "TensorBatches"]:
        """Batches of all samples but a share, and batches of that share."""
        rest, held = divided_rows(self.samples, share, seed)
        return self._of(rest), self._of(held)

    def _of(self, rows: Tensor) -> "TensorBatches":
        twin = copy.copy(self)
        twin.tensors, twin.samples = {name: tensor[rows] for name, tensor in self.tensors.items()}, len(rows)
        return twin


def calibration_batches(tensors: Batch, batches: int, batch_size: int, seed: int) -> list[Batch]:
    """Draw `batches` batches without repeats, the same for the same seed.

    Raises:
        InputError: If that asks for no sample or for more than there are.
    """
    count, wanted = len(tensors["labels"]), batches * batch_size
    if not 0 < wanted <= count:
        raise InputError(
            f"data.calibration_batches={batches}, data.calibration_batch_size={batch_size}: "
            f"{wanted} samples; must be between 1 and the {count} training samples"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]
    return [{name: tensor[rows] for name, tensor in tensors.items()} for rows in order.split(batch_size)]


def fingerprint_of(*parts: Tensor | int | str) -> str:
    """Hash tensors by content, shape and dtype, and plain values by their text."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.cpu().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"|{part}".encode())
    return digest.hexdigest()
