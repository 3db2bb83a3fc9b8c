"""A supervised training loop: AdamW, cosine schedule with warm-up, nothing about pruning."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import RunError
from utils.progress import progress_bar
from utils.rules import Count, NonNegative, Positive, Ratio, check_fields

Batch = dict[str, Tensor]
History = list[dict[str, float]]


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
    """

    epochs: Count = 40
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 0.3
    warmup: Ratio = 0.1
    label_smoothing: Ratio = 0.1
    clip: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def fit(
    network: nn.Module,
    loss_of: Callable[[Batch, float], Tensor],
    epochs_of: Iterable[Batch],
    settings: Training,
    score: Callable[[], dict[str, float]],
    title: str = "train",
) -> History:
    """Train a network in place and leave it in eval mode with its last weights.

    Args:
        network: The module whose parameters are trained.
        loss_of: Maps a batch and the label smoothing to the mean loss.
        epochs_of: The training batches; iterated once per epoch, with a length.
        settings: See `Training`.
        score: Measures the network in eval mode after each epoch, by name.
        title: Label of the progress bar.

    Returns:
        One row an epoch: epoch, learning_rate, train_loss and what `score` returned.

    Raises:
        RunError: If the loss becomes NaN or infinite.
    """
    steps_per_epoch = len(epochs_of)  # type: ignore[arg-type]
    optimizer, schedule = _optimizer(network, settings, settings.epochs * steps_per_epoch)
    history: History = []
    with progress_bar(title, settings.epochs) as advance:
        for epoch in range(1, settings.epochs + 1):
            network.train()
            losses = [_step(network, loss_of, batch, optimizer, schedule, settings) for batch in epochs_of]
            train_loss = float(torch.stack(losses).mean())
            if not math.isfinite(train_loss):
                raise RunError(f"{title}: the loss is {train_loss} in epoch {epoch}; it must stay finite")
            network.eval()
            row = {"epoch": epoch, "learning_rate": schedule.get_last_lr()[0], "train_loss": train_loss, **score()}
            history.append(row)
            advance(" ".join(f"{k} {v:.3f}" for k, v in row.items() if k not in ("epoch", "learning_rate")))
    return history


def _optimizer(network: nn.Module, settings: Training, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    named = [(name.rpartition(".")[2], p) for name, p in network.named_parameters()]
    matrices = [p for name, p in named if name == "weight" and p.ndim >= 2]
    others = [p for name, p in named if name != "weight" or p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    warm = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _step(
    network: nn.Module,
    loss_of: Callable[[Batch, float], Tensor],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    settings: Training,
) -> Tensor:
    loss = loss_of(batch, settings.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    optimizer.step()
    schedule.step()
    return loss.detach()
