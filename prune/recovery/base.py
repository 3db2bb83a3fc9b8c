"""Recovering a pruned model by training: what all ways share, cached and resumable."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn

import utils.training
from data.base import DataBundle, Divisible
from models.base import PrunableModel
from models.pretrained import validate
from prune.recovery import augment, zeros
from prune.recovery.augment import Augmentation, augmented
from prune.recovery.checkpointing import checkpointed
from prune.recovery.spread import Spread, shard_trainee, spread_of
from prune.recovery.zeros import sparse_weights, zeros_kept
from utils.code import code_hash
from utils.data_parallel import divided_loss
from utils.errors import InputError
from utils.launched import launched
from utils.progress import followed
from utils.rules import Count, NonNegative, Positive, Range, Ratio
from utils.storage import Artifact, Scratch, Store, folder_name
from utils.training import History, TrainBatches, Trained, Training, fit


@dataclass(frozen=True)
class Recovered:
    """A recovered model, and what it took.

    Attributes:
        model: The model to measure.
        history: Row 0 is the pruned model before any training, then one row an epoch.
        facts: Epochs, steps, samples seen, seconds of training (also per epoch), trained parameters, which
            epoch is used, and why training stopped early if it did.
    """

    model: PrunableModel
    history: History = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Whether training ended before its time, and why."""
        stopped = self.facts.get("stopped")
        return [f"Recovery stopped after {self.facts['epochs']} epochs: {stopped}."] if stopped else []


class Recovery(Protocol):
    """What `recover=` builds."""

    def recover(
        self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, store: Store, seed: int
    ) -> Recovered:
        """Return the model to measure; `pruned` and `dense` stay as they were."""
        ...


@dataclass(frozen=True)
class Trainee:
    """What of a model is trained.

    Attributes:
        network: Its parameters are trained and kept; `train` and `eval` of it reach the whole model.
        after_step: Called after every step, to put weights back that must not move.
        finish: Brings what was trained into the model.
    """

    network: nn.Module
    after_step: Callable[[], None] | None = None
    finish: Callable[[], None] = lambda: None

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class TrainedRecovery(Training, ABC):
    """Recovery by gradient descent; a subclass says on which loss, and may say of what.

    Attributes:
        use: Measure the weights after the `last` epoch, or after the `best` by validation
            loss (which looks at the split that the metrics are measured on).
        patience: Stop after so many epochs without a better one, judged on a part of train that is
            then held out, and measure the best of them; None trains for all epochs.
        holdout: That part.
        grad_checkpointing: Keep only the inputs of each block, and run it again on the way back.
        augment: A policy of timm's for images, such as `rand-m9-mstd0.5-inc1`; None for none.
        mixup: Parameter of mixup; 0 for none.
        cutmix: Parameter of CutMix; 0 for none.
        erase: Probability that a part of an image is erased.
        sharded: Divide weights, gradients and the optimizer's state between the processes of a run (FSDP).
    """

    epochs: Count = 40
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 0.3
    use: Literal["last", "best"] = "last"
    patience: Count | None = None
    holdout: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.1
    grad_checkpointing: bool = False
    augment: str | None = None
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    erase: Ratio = 0.0
    sharded: bool = False

    # whether the loss of a batch is made of those of its rows: `loss` then takes some rows and the whole batch
    divides = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharded and launched() is None:
            rule = "divides weights between processes; start with torchrun --nproc_per_node=2, or leave it false"
            raise InputError(f"recover.sharded=true: {rule}")

    @abstractmethod
    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[..., Tensor]:
        """Return the loss to train `pruned` on, as a function of a batch.

        Where `divides` is set it also takes rows of a batch with the whole one, and weighs their loss by their share.
        """

    def trainee(self, model: PrunableModel, dense: PrunableModel, seed: int) -> Trainee:
        """What is trained of a copy of the pruned model: here all of it."""
        return Trainee(model.network, zeros_kept(model.network, dense.network, sparse_weights(model)))

    def depends_on(self) -> dict[str, Any]:
        """What the trained weights depend on beside settings, code, models, data, seed and torch."""
        return {}

    def recover(
        self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, store: Store, seed: int
    ) -> Recovered:
        """Train a copy of the pruned model, or fetch the weights if that was done before.

        Weights that pruning has set to zero stay zero. Where a loss stops being finite, training stops,
        the weights of the last good epoch are taken, and the facts say so.

        Raises:
            InputError: If there is no training data, or a setting does not fit model or data.
        """
        if len(data.train) == 0:
            raise InputError(f"recover: data={data.name} has no training samples; use recover=none")
        model, before = pruned.copy(), validate(pruned, data)
        model.network.float()
        trainee, spread = self.trainee(model, dense, seed), spread_of(self, model.network, data)

        def compute(scratch: Scratch) -> Artifact:
            start = time.perf_counter()
            own = self._sharded(pruned, dense, seed) if spread.sharded else (trainee, model)
            trained = self._trained(*own, dense, data, seed, scratch, spread)
            weights = {f"last/{n}": t for n, t in trained.last.items()} | {
                f"best/{n}": t for n, t in trained.best.items()
            }
            facts = {"history": trained.history, "best_epoch": trained.best_epoch}
            facts |= {"epoch_seconds": trained.seconds, "stopped": trained.stopped}
            return Artifact(weights, facts | {"seconds": time.perf_counter() - start})

        folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(pruned.name)}"
        name = f"recovered-{type(self).__name__.lower()}"
        found = store.fetch(folder, name, self._key(pruned, dense, data, seed) | spread.facts(), compute)
        use = f"{self._used}/"
        chosen = {n.removeprefix(use): t for n, t in found.artifact.tensors.items() if n.startswith(use)}
        trainee.network.load_state_dict(chosen)
        facts: dict[str, Any] = {**found.artifact.facts, "trainable_params": trainee.trainable}
        trainee.finish()
        model.network.to(pruned.dtype)
        history = [{"epoch": 0, **before}, *facts["history"]]
        return Recovered(model, history, self._facts(facts, data) | spread.facts())

    def _sharded(self, pruned: PrunableModel, dense: PrunableModel, seed: int) -> tuple[Trainee, PrunableModel]:
        """A copy to train whose weights are divided between the processes; the copy to measure stays whole."""
        model = pruned.copy()
        model.network.float()
        return shard_trainee(self.trainee(model, dense, seed), model), model

    def _trained(
        self, trainee: Trainee, model: PrunableModel, dense: PrunableModel, data: DataBundle, seed: int,
        scratch: Scratch, spread: Spread,
    ) -> Trained:  # fmt: skip
        """Train, on what is not held out, behind the augmentation that was asked for."""
        train, held = self._split(data)
        how = Augmentation(self.augment, self.mixup, self.cutmix, self.erase)
        kept = trainee.after_step
        loss = self.loss(model, dense, data)
        if spread.divided:
            loss = divided_loss(trainee.network, loss, spread.sharded)
        with checkpointed(model) if self.grad_checkpointing else nullcontext():
            return fit(
                trainee.network, loss, augmented(train, how, data, model), self,
                lambda: _scored(model, data, held, not spread.sharded), seed, "recover", scratch, kept,
                after_backward=kept.clear_gradients if isinstance(kept, zeros.Kept) else None,
                patience=self.patience, keep_good=True, divided=spread.divided,
            )  # fmt: skip

    def _split(self, data: DataBundle) -> tuple[TrainBatches, TrainBatches | None]:
        """The training batches, and those held out to judge by."""
        if self.patience is None:
            return data.train, None
        if not isinstance(data.train, Divisible) or data.train_samples < 2:
            raise InputError(f"recover.patience={self.patience}: data={data.name} can't be divided; must be null")
        return data.train.divided(self.holdout, seed=0)

    @property
    def _used(self) -> str:
        return "best" if self.patience is not None else self.use

    def _facts(self, facts: dict[str, Any], data: DataBundle) -> dict[str, Any]:
        epochs, train = len(facts["history"]), self._split(data)[0]
        held = round(self.holdout * data.train_samples) if self.patience is not None else 0
        used = facts["best_epoch"] if self._used == "best" else epochs
        return {
            "method": type(self).__name__.lower(), "epochs": epochs, "steps": epochs * len(train),
            "samples_seen": epochs * (data.train_samples - held), "seconds": facts["seconds"],
            "epoch_seconds": facts["epoch_seconds"], "stopped": facts["stopped"],
            "best_epoch": facts["best_epoch"], "used_epoch": used, "trainable_params": facts["trainable_params"],
        }  # fmt: skip

    def _key(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle, seed: int) -> dict[str, Any]:
        return {
            "recovery": f"{type(self).__module__}.{type(self).__qualname__}",
            "code": code_hash(type(self), type(pruned), *pruned.code, type(data.task), utils.training, zeros, augment),
            "settings": {name: value for name, value in asdict(replace(self, use="last")).items() if name != "sharded"},
            "pruned": pruned.fingerprint(),
            "sparse": pruned.sparse,
            "dense": dense.fingerprint(),
            "train": data.fingerprints["train"],
            "seed": seed,
            "torch": torch.__version__,
            "device": pruned.device.type,
            **self.depends_on(),
        }


@torch.inference_mode()
def _scored(model: PrunableModel, data: DataBundle, held: TrainBatches | None, joint: bool) -> dict[str, float]:
    """Loss and quality on the validation split, and the loss on what is held out of train."""
    return validate(model, data, joint) | ({"held_out_loss": _mean_loss(model, data, held)} if held is not None else {})


def _mean_loss(model: PrunableModel, data: DataBundle, batches: TrainBatches) -> float:
    batches.set_epoch(1)  # the same random changes every time
    total, count = 0.0, 0
    for batch in followed("held-out loss", batches):
        placed, size = model.place(batch), len(next(iter(batch.values())))
        total += float(data.task.loss(model.logits(placed), placed)) * size
        count += size
    return total / max(count, 1)
