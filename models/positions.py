"""At how many positions each linear and convolution of a network runs."""

from typing import Any

import torch
from torch import Tensor, nn

from models.base import Batch, PrunableModel
from utils.hooks import hooked


def positions_per_call(model: PrunableModel, example: Batch) -> dict[str, list[int]]:
    """How many output positions each linear and convolution computes for one sample, call by call."""
    seen: dict[str, list[int]] = {}

    def counter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            is_linear = isinstance(module, nn.Linear)
            count = output.shape[:-1].numel() if is_linear else output[:, :1].numel()
            seen.setdefault(name, []).append(count // batch_size)

        return hook

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = [(n, m) for n, m in model.network.named_modules() if isinstance(m, kinds)]
    batch_size = len(next(iter(example.values())))
    with torch.inference_mode(), hooked(after=[(m, counter(n)) for n, m in modules]):
        model.logits(model.place(example))
    return seen
