"""LoRA: train a low-rank addition to each linear, then merge it (Hu et al., 2021, arXiv:2106.09685).

Of a linear's weight W (O, I) the sum `W + (alpha / rank) * B A` is trained in A (rank, I) and B (O, rank), which
starts at zero. Where pruning has left zeros in W, the addition is masked by them, in training and in the merged weight
alike.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from data.base import DataBundle
from models.base import PrunableModel
from models.pretrained import task_loss
from prune.recovery.base import TrainedRecovery, Trainee
from prune.recovery.zeros import kept_zeros, sparse_weights
from utils.errors import InputError, RunError
from utils.rules import Count, Positive, Range
from utils.seed import random_state_restored, seed_everything

ADAPTER = "default"
INSTALL = "recover=lora needs peft: pip install -r requirements-lora.txt"


@dataclass(frozen=True, kw_only=True)
class Lora(TrainedRecovery):
    """AdamW on the labels of the train split, in low-rank additions alone; merged afterwards.

    Attributes:
        rank: Rank of each addition.
        alpha: Its scale is `alpha / rank`.
        dropout: Of what the additions read.
        targets: Patterns of linears such as `*.q_proj`; None: every linear in the model's blocks.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    targets: tuple[str, ...] | None = None

    divides = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and not self.targets:
            raise InputError("recover.targets=[]: must name at least one linear, or be null for all in the blocks")
        if self.sharded:
            raise InputError("recover.sharded=true: recover=lora trains too little to divide; must be false")
        if importlib.util.find_spec("peft") is None:
            raise InputError(INSTALL)

    def loss(self, pruned: PrunableModel, dense: PrunableModel, data: DataBundle) -> Callable[..., Tensor]:
        """The task's loss; the dense model is not looked at."""
        return task_loss(pruned, data, self)

    def depends_on(self) -> dict[str, Any]:
        """The library that lays the additions out."""
        return {"peft": version("peft")}

    def trainee(self, model: PrunableModel, dense: PrunableModel, seed: int) -> Trainee:
        """Put additions into a model's linears; they are what is trained.

        Raises:
            InputError: If there is no linear to add to.
        """
        names = target_linears(model, self.targets)
        zeros = kept_zeros(model.network, dense.network, sparse_weights(model))
        moving = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
        with random_state_restored():
            seed_everything(seed)
            layers = self._adapted(model.network, names)
        for name, layer in layers.items():
            if (zero := zeros.get(f"{name}.weight")) is not None:
                layer.forward = masked_forward(layer, ~zero)

        def finish() -> None:
            merge(model.network, layers, zeros)
            for name, parameter in model.network.named_parameters():
                parameter.requires_grad_(moving[name])

        return Trainee(Additions(model.network, layers), finish=finish)

    def _adapted(self, network: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
        """Wrap the named linears in place; peft's layers by name."""
        from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found]

        settings = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=[*names])  # type: ignore[arg-type]
        inject_adapter_in_model(settings, network, adapter_name=ADAPTER)
        vars(network).pop("peft_config", None)
        layers = {name: network.get_submodule(name) for name in names}
        if plain := [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]:
            raise RunError(f"recover=lora: peft left {plain[0]} as it was")
        return layers


class Additions(nn.Module):
    """The additions of a network as a module of their own: only they are trained and stored."""

    def __init__(self, network: nn.Module, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self._whole = [network]  # in a list, so that its weights are not this module's
        for name, layer in layers.items():
            for part in ("lora_A", "lora_B"):
                self.add_module(f"{name}.{part}".replace(".", "/"), getattr(layer, part)[ADAPTER])

    def train(self, mode: bool = True) -> "Additions":
        """Switch the whole network."""
        super().train(mode)
        self._whole[0].train(mode)
        return self


def target_linears(model: PrunableModel, patterns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the linears in a model's blocks that get an addition.

    Raises:
        InputError: If there are none, or a pattern matches none.
    """
    named = ((f"{block}.{name}" if name else block, module) for block in model.blocks()
             for name, module in model.network.get_submodule(block).named_modules())  # fmt: skip
    found = [name for name, module in named if isinstance(module, nn.Linear) and module.weight.numel()]
    if not found:
        raise InputError(f"recover=lora: model={model.name} has no linear in its blocks; use recover=finetune")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in found):
            raise InputError(f"recover.targets: {pattern!r} matches no linear; there are {', '.join(found[:8])}, …")
    return tuple(name for name in found if patterns is None or any(fnmatchcase(name, p) for p in patterns))


def masked_forward(layer: Any, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """A LoRA layer's forward whose addition is zero wherever `kept` (O, I), bool, is not set."""

    def forward(x: Tensor) -> Tensor:
        addition = layer.get_delta_weight(ADAPTER) * kept
        return layer.base_layer(x) + linear(layer.lora_dropout[ADAPTER](x), addition)

    return forward


@torch.no_grad()
def merge(network: nn.Module, layers: Mapping[str, Any], zeros: Mapping[str, Tensor]) -> None:
    """Add what was trained to the weights and put the plain linears back, in place."""
    for name, layer in layers.items():
        addition, base = layer.get_delta_weight(ADAPTER), layer.base_layer
        zero = zeros.get(f"{name}.weight")
        base.weight += addition if zero is None else addition.masked_fill(zero, 0)
        network.set_submodule(name, base)
