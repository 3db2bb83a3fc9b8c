"""Recovering a pruned model by training: what all ways share, cached and resumable."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

import utils.training
from data.base import DataBundle
from models.base import Batch, PrunableModel
from models.pretrained import validate
from prune.recovery import zeros
from prune.recovery.zeros import zeros_kept
from utils.code import code_hash
from utils.errors import InputError
from utils.rules import Count, NonNegative, Positive
from utils.storage import Artifact, Scratch, Store, folder_name
from utils.training import History, Training, fit


@dataclass(frozen=True)
class Recovered:
    """A recovered model, and what it took.

    Attributes:
        model: The model to measure.
        history: Row 0 is the pruned model before any training, then one row an epoch.
        facts: Epochs, steps, samples seen, seconds of training, and which epoch is used.
    """

    model: PrunableModel
    history: History = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Recovery(Protocol):
    """What `recover=` builds."""

    def recover(
        self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, store: Store, seed: int
    ) -> Recovered:
        """Return the model to measure; `pruned` and `dense` stay as they were."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainedRecovery(Training, ABC):
    """Recovery by gradient descent; a subclass says on which loss.

    Attributes:
        use: Measure the weights after the `last` epoch, or after the `best` by validation
            loss (which looks at the split that the metrics are measured on).
    """

    epochs: Count = 40
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 0.3
    use: Literal["last", "best"] = "last"

    @abstractmethod
    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[[Batch], Tensor]:
        """Return the loss to train `pruned` on, as a function of a batch."""

    def recover(
        self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, store: Store, seed: int
    ) -> Recovered:
        """Train a copy of the pruned model, or fetch the weights if that was done before.

        Weights that pruning has set to zero stay zero.

        Raises:
            InputError: If there is no training data.
            RunError: If the loss stops being finite.
        """
        if len(data.train) == 0:
            raise InputError(f"recover: data={data.name} has no training samples; use recover=none")
        model, before = pruned.copy(), validate(pruned, data)
        model.network.float()

        def compute(scratch: Scratch) -> Artifact:
            start = time.perf_counter()
            loss, kept = self.loss(model, dense, data), zeros_kept(model.network, dense.network)
            trained = fit(
                model.network, loss, data.train, self, lambda: validate(model, data), seed, "recover", scratch, kept
            )
            weights = {f"last/{n}": t for n, t in trained.last.items()} | {
                f"best/{n}": t for n, t in trained.best.items()
            }
            facts = {"history": trained.history, "best_epoch": trained.best_epoch}
            return Artifact(weights, facts | {"seconds": time.perf_counter() - start})

        folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(pruned.name)}"
        name = f"recovered-{type(self).__name__.lower()}"
        found = store.fetch(folder, name, self._key(pruned, dense, data, seed), compute)
        chosen = {
            n.removeprefix(f"{self.use}/"): t for n, t in found.artifact.tensors.items() if n.startswith(self.use)
        }
        model.network.load_state_dict(chosen)
        model.network.to(pruned.dtype)
        facts = found.artifact.facts
        return Recovered(model, [{"epoch": 0, **before}, *facts["history"]], self._facts(facts, data))

    def _facts(self, facts: dict[str, Any], data: DataBundle) -> dict[str, Any]:
        steps = self.epochs * len(data.train)
        used = facts["best_epoch"] if self.use == "best" else self.epochs
        return {
            "method": type(self).__name__.lower(), "epochs": self.epochs, "steps": steps,
            "samples_seen": self.epochs * data.train_samples, "seconds": facts["seconds"],
            "best_epoch": facts["best_epoch"], "used_epoch": used,
        }  # fmt: skip

    def _key(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, seed: int) -> dict[str, Any]:
        return {
            "recovery": f"{type(self).__module__}.{type(self).__qualname__}",
            "code": code_hash(type(self), type(pruned), *pruned.code, type(data.task), utils.training, zeros),
            "settings": asdict(replace(self, use="last")),
            "pruned": pruned.fingerprint(),
            "dense": dense.fingerprint(),
            "train": data.fingerprints["train"],
            "seed": seed,
            "torch": torch.__version__,
            "device": pruned.device.type,
        }
