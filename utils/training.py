"""A supervised training loop that can be killed and goes on: AdamW, cosine schedule with warm-up.

Every epoch depends only on the weights and optimizer state before it: the data's order and
torch's generator are set from the seed and the epoch. An interrupted training therefore ends
with the same weights, bit for bit, as one that ran through.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from utils.errors import RunError
from utils.progress import progress_bar
from utils.rules import Count, NonNegative, Positive, Ratio, check_fields
from utils.seed import random_state_restored, seed_everything
from utils.storage import Artifact, Scratch

Batch = dict[str, Tensor]
History = list[dict[str, float]]


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
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled decay, on weight matrices only: no bias, norm or position.
        warmup: Fraction of all steps during which the learning rate rises from 0.
        label_smoothing: Probability mass spread over the other classes.
        clip: Largest gradient norm.
        mixed_precision: bfloat16 autocast; `auto` uses it on CUDA, where it helps.
    """

    epochs: Count = 40
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 0.3
    warmup: Ratio = 0.1
    label_smoothing: Ratio = 0.1
    clip: Positive = 1.0
    mixed_precision: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class Trained:
    """What a training leaves: one row an epoch, and the weights after the best and the last.

    The best epoch is the one with the lowest `validation_loss`.
    """

    history: History
    best_epoch: int
    best: dict[str, Tensor]
    last: dict[str, Tensor]


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
) -> Trained:
    """Train a network in place and leave it in eval mode with its last weights.

    Args:
        network: The module whose parameters are trained.
        loss_of: Maps a batch to the mean loss.
        batches: The training batches.
        settings: See `Training`.
        score: Measures the network in eval mode after each epoch, by name; its
            `validation_loss` decides which epoch is the best.
        seed: Seeds whatever the network draws, such as dropout.
        title: Label of the progress bar.
        scratch: Where to keep the state after every epoch, and to go on from.
        after_step: Called after every step, to put weights back that must not move.

    Raises:
        RunError: If the loss becomes NaN or infinite.
    """
    loop = _Loop(network, loss_of, batches, settings, score, title, after_step)
    if scratch is not None and (left := scratch.load()) is not None:
        loop.restore(left)
    with random_state_restored(), progress_bar(title, settings.epochs, done=len(loop.history)) as advance:
        for epoch in range(len(loop.history) + 1, settings.epochs + 1):
            seed_everything((1_000_003 * seed + epoch) % 2**32)
            row = loop.run_epoch(epoch)
            if scratch is not None and epoch < settings.epochs:
                scratch.save(loop.state())
            advance(" ".join(f"{k} {v:.3f}" for k, v in row.items() if k not in ("epoch", "learning_rate")))
    return Trained(loop.history, loop.best_epoch, loop.best, _weights(network))


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
    ) -> None:
        self.network, self.loss_of, self.batches = network, loss_of, batches
        self.settings, self.score, self.title = settings, score, title
        self.after_step = after_step
        self.optimizer = _optimizer(network, settings)
        self.history: History = []
        self.best_epoch, self.best = 0, _weights(network)
        device = next(network.parameters()).device.type
        on = settings.mixed_precision == "on" or (settings.mixed_precision == "auto" and device == "cuda")
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=on)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        self.batches.set_epoch(epoch)
        self.network.train()
        first = (epoch - 1) * len(self.batches)
        losses = [self._step(batch, first + step) for step, batch in enumerate(self.batches)]
        train_loss = float(torch.stack(losses).mean())
        if not math.isfinite(train_loss):
            raise RunError(f"{self.title}: the loss is {train_loss} in epoch {epoch}; it must stay finite")
        self.network.eval()
        row = {"epoch": epoch, "learning_rate": self.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
        self.history.append(row | self.score())
        losses_so_far = [row.get("validation_loss", math.inf) for row in self.history]
        if losses_so_far[-1] <= min(losses_so_far):
            self.best_epoch, self.best = epoch, _weights(self.network)
        return self.history[-1]

    def _step(self, batch: Batch, step: int) -> Tensor:
        rate = self.settings.learning_rate * schedule(
            step, self.settings.epochs * len(self.batches), self.settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.autocast:
            loss = self.loss_of(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        return loss.detach()

    def state(self) -> Artifact:
        moments = {
            f"optimizer/{number}/{name}": value
            for number, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        # copies: tied tensors share memory, which a file can't hold
        weights = {f"network/{name}": tensor for name, tensor in _weights(self.network).items()}
        best = {f"best/{name}": tensor for name, tensor in self.best.items()}
        return Artifact({**weights, **best, **moments}, {"history": self.history, "best_epoch": self.best_epoch})

    def restore(self, left: Artifact) -> None:
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
        for name, tensor in left.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        self.network.load_state_dict(parts["network"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, leaf = name.partition("/")
            moments.setdefault(int(number), {})[leaf] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.best, self.best_epoch = parts["best"], left.facts["best_epoch"]
        self.history = left.facts["history"]


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
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
