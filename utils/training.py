"""A supervised training loop that can be killed and goes on: AdamW or another of timm's, cosine schedule with warm-up.

Every epoch depends only on the weights and optimizer state before it: the data's order and
torch's generator are set from the seed and the epoch. An interrupted training therefore ends
with the same weights, bit for bit, as one that ran through.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor, nn

from utils.data_parallel import divided_like, load_whole, mean_of, own_stream, whole
from utils.errors import RunError
from utils.optimizers import Settings, optimizer_of, restore_state, state_of
from utils.progress import progress_bar
from utils.rules import Count, NonNegative, Positive, Range, Ratio, check_fields
from utils.seed import random_state_restored, seed_everything
from utils.storage import Artifact, Scratch

Batch = dict[str, Tensor]
History = list[dict[str, float]]
# what tells the best epoch, the first that was measured
JUDGES = ("held_out_loss", "validation_loss")


class TrainBatches(Protocol):
    """Batches whose order depends on the epoch alone, so that training can stop and go on."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled decay, on weight matrices only: no bias, norm or position.
        warmup: Fraction of all steps during which the learning rate rises from 0.
        label_smoothing: Probability mass spread over the other classes.
        clip: Largest gradient norm.
        mixed_precision: bfloat16 autocast; `auto` uses it on CUDA, where it helps.
        optimizer: `adamw`, or the name of another of timm's optimizers, such as `sgd` or `lamb`.
        momentum: Of optimizers that have one by that name.
        average: Decay of a running average of the weights, which is then measured and kept in their place; 0: none.
    """

    epochs: Count = 40
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 0.3
    warmup: Ratio = 0.1
    label_smoothing: Ratio = 0.1
    clip: Positive = 1.0
    mixed_precision: Literal["auto", "on", "off"] = "auto"
    optimizer: str = "adamw"
    momentum: Ratio = 0.9
    average: Annotated[float, Range(0, 1, open_high=True)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class Trained:
    """What a training leaves: one row an epoch, and the weights after the best and the last.

    The best epoch is the one with the lowest `held_out_loss`, or without one the lowest `validation_loss`.

    Attributes:
        history: One row a finished epoch.
        best_epoch: From 1; 0 where no epoch came to its end.
        best: Weights after it.
        last: Weights after the last epoch in which everything was finite.
        seconds: Wall time of each epoch, scoring included.
        stopped: Why it ended before its time; None if it did not.
    """

    history: History
    best_epoch: int
    best: dict[str, Tensor]
    last: dict[str, Tensor]
    seconds: list[float] = field(default_factory=list)
    stopped: str | None = None


class NotFiniteError(RunError):
    """A loss became NaN or infinite."""


def fit(
    network: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: TrainBatches,
    settings: Training,
    score: Callable[[], dict[str, float]],
    seed: int = 0,
    title: str = "train",
    scratch: Scratch | None = None,
    after_step: Callable[[], None] | None = None,
    *,
    after_backward: Callable[[], None] | None = None,
    patience: int | None = None,
    keep_good: bool = False,
    divided: bool = False,
) -> Trained:
    """Train a network in place and leave it in eval mode with its last weights.

    Args:
        network: The module whose parameters are trained.
        loss_of: Maps a batch to the mean loss.
        batches: The training batches.
        settings: See `Training`.
        score: Measures the network in eval mode after each epoch, by name; its `held_out_loss`, or
            without one its `validation_loss`, decides which epoch is the best.
        seed: Seeds whatever the network draws, such as dropout.
        title: Label of the progress bar.
        scratch: Where to keep the state after every epoch, and to go on from.
        after_step: Called after every step, to put weights back that must not move.
        after_backward: Called before gradients are clipped, to clear those of such weights.
        patience: Stop after so many epochs without a better one; None never does.
        divided: Whether `loss_of` is this process's part of a loss that all processes of a run make together.
        keep_good: Where a loss is not finite, end with the weights of the last epoch in which all were.

    Raises:
        InputError: If there is no such optimizer, or it can't be used here.
        RunError: If the loss becomes NaN or infinite, unless `keep_good`.
    """
    loop = _Loop(network, loss_of, batches, settings, score, title, after_step, after_backward, divided)
    stopped: str | None = None
    if scratch is not None and (left := scratch.load()) is not None:
        loop.restore(left)
    steps, note = len(batches), ""
    with random_state_restored(), progress_bar(title, settings.epochs * steps, len(loop.history) * steps) as advance:
        for epoch in range(len(loop.history) + 1, settings.epochs + 1):
            if patience is not None and len(loop.history) - loop.best_epoch >= patience:
                stopped = f"no epoch after {loop.best_epoch} was better, {patience} were waited for"
                break
            seed_everything((1_000_003 * seed + epoch) % 2**32)
            try:
                row = loop.run_epoch(epoch, partial(advance, f"epoch {epoch} {note}"))
            except NotFiniteError as error:
                if not keep_good:
                    raise
                stopped = f"{error}; the weights after epoch {epoch - 1} are the last good ones"
                break
            if scratch is not None and epoch < settings.epochs:
                scratch.save(loop.state())
            note = " ".join(f"{k} {v:.3f}" for k, v in row.items() if k not in ("epoch", "learning_rate"))
    load_whole(network, loop.good)
    network.eval()
    return Trained(loop.history, loop.best_epoch, loop.best, loop.good, loop.seconds, stopped)


class _Loop:
    """The mutable state of a training, and how to save and restore it."""

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[Batch], Tensor],
        batches: TrainBatches,
        settings: Training,
        score: Callable[[], dict[str, float]],
        title: str,
        after_step: Callable[[], None] | None = None,
        after_backward: Callable[[], None] | None = None,
        divided: bool = False,
    ) -> None:
        self.network, self.loss_of, self.batches = network, loss_of, batches
        self.settings, self.score, self.title = settings, score, title
        self.after_step, self.after_backward, self.divided = after_step, after_backward, divided
        self.optimizer = _optimizer(network, settings)
        self.history: History = []
        self.seconds: list[float] = []
        self.best_epoch, self.best = 0, _weights(network)
        self.good = _copies(self.best)
        self.average = [p.detach().clone() for p in network.parameters()] if settings.average else []
        device = next(network.parameters()).device.type
        on = settings.mixed_precision == "on" or (settings.mixed_precision == "auto" and device == "cuda")
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=on)

    def run_epoch(self, epoch: int, stepped: Callable[[], object]) -> dict[str, float]:
        start = time.perf_counter()
        self.batches.set_epoch(epoch)
        self.network.train()
        first = (epoch - 1) * len(self.batches)
        losses = []
        for step, batch in enumerate(self.batches):
            losses.append(self._step(batch, first + step))
            stepped()
        stacked = torch.stack(losses)
        train_loss = float((mean_of(stacked) if self.divided else stacked).mean())
        self._refuse_not_finite("", train_loss, epoch)
        self.network.eval()
        row = {"epoch": epoch, "learning_rate": self.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
        with self._averaged():
            row |= self.score()
            for judge in JUDGES:
                self._refuse_not_finite(f"{judge.removesuffix('_loss').replace('_', '-')} ", row.get(judge, 0.0), epoch)
            self.good = _weights(self.network)
        self.history.append(row)
        losses_so_far = [_judged(row) for row in self.history]
        if losses_so_far[-1] <= min(losses_so_far):
            self.best_epoch, self.best = epoch, _copies(self.good)
        self.seconds.append(time.perf_counter() - start)
        return row

    def _refuse_not_finite(self, which: str, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise NotFiniteError(f"{self.title}: the {which}loss is {loss} in epoch {epoch}; it must stay finite")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights, where there are any, into the network for the time of a `with`."""
        moving = [p.detach().clone() for p in self.network.parameters()] if self.average else []
        _copy(self.average, self.network)
        if self.average and self.after_step is not None:
            self.after_step()
        yield
        _copy(moving, self.network)

    def _step(self, batch: Batch, step: int) -> Tensor:
        rate = self.settings.learning_rate * schedule(
            step, self.settings.epochs * len(self.batches), self.settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with own_stream(step) if self.divided else nullcontext():
            with self.autocast:
                loss = self.loss_of(batch)
            loss.backward()
        if self.after_backward is not None:
            self.after_backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        self._follow(step)
        return loss.detach()

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the average on; it follows faster at first."""
        decay = min(self.settings.average, (1 + step) / (10 + step))
        for mean, weight in zip(self.average, self.network.parameters() if self.average else (), strict=True):
            mean.lerp_(weight, 1 - decay)

    def state(self) -> Artifact:
        moments, facts = state_of(self.optimizer)
        # copies: tied tensors share memory, which a file can't hold
        parts = {
            "network": _weights(self.network), "best": self.best,
            "optimizer": {name: whole(moment) for name, moment in moments.items()},
            "average": {str(number): whole(mean) for number, mean in enumerate(self.average)},
            "good": self.good if self.average else {},
        }  # fmt: skip
        tensors = {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
        return Artifact(tensors, {
            "history": self.history, "best_epoch": self.best_epoch, "seconds": self.seconds, "optimizer": facts,
        })  # fmt: skip

    def restore(self, left: Artifact) -> None:
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "good": {}, "optimizer": {}, "average": {}}
        for name, tensor in left.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        load_whole(self.network, parts["network"])
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = sorted(parts["optimizer"].items())
        moments = {n: divided_like(moment, held[int(n.split("/")[0])]) for n, moment in kept}
        restore_state(self.optimizer, moments, left.facts["optimizer"])
        for number, mean in enumerate(self.average):
            mean.copy_(divided_like(parts["average"][str(number)], mean))
        self.best, self.best_epoch = parts["best"], left.facts["best_epoch"]
        self.good = parts["good"] or _weights(self.network)
        self.history, self.seconds = left.facts["history"], left.facts["seconds"]


def _judged(row: dict[str, float]) -> float:
    return next((row[name] for name in JUDGES if name in row), math.inf)


@torch.no_grad()
def _copy(weights: list[Tensor], network: nn.Module) -> None:
    for weight, new in zip(network.parameters() if weights else (), weights, strict=True):
        weight.copy_(new)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: a linear rise over `warmup * steps`, then half a cosine to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    named = [(name.rpartition(".")[2], p) for name, p in network.named_parameters()]
    matrices = [p for name, p in named if name == "weight" and p.ndim >= 2]
    others = [p for name, p in named if name != "weight" or p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return optimizer_of(groups, Settings(settings.optimizer, settings.learning_rate, settings.momentum))


def _copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in network.state_dict().items()}
