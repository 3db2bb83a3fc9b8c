"""Optimizers by name, and their whole state as tensors and plain values, so that a training can go on."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError

Group = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an optimizer is built with.

    Attributes:
        name: `adamw`, or another name that timm knows.
        learning_rate: Set anew before every step.
        momentum: For those that have one by that name.
    """

    name: str
    learning_rate: float
    momentum: float


def optimizer_of(groups: list[Group], settings: Settings) -> torch.optim.Optimizer:
    """Build an optimizer; `adamw` is torch's own, fused, any other comes from timm's factory.

    Args:
        groups: Parameters with their weight decay.
        settings: See `Settings`.

    Raises:
        InputError: If timm knows no such name, can't build it here, or it needs more than gradients.
    """
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    # imported only here: timm takes a second, and most trainings do without
    from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]

    name = settings.name.lower()
    known = [str(option) for option in list_optimizers()]
    if name.rpartition("_")[2] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise InputError(f"optimizer={settings.name}: timm has none; did you mean {' or '.join(near) or 'adamw'}?")
    try:
        built = create_optimizer_v2(groups, opt=name, lr=settings.learning_rate, momentum=settings.momentum)
    except Exception as error:  # a missing library, or arguments that it does not take
        why = str(error).strip().splitlines()[:1]
        raise InputError(f"optimizer={settings.name}: can't be built: {why[0] if why else repr(error)}") from error
    if getattr(built, "is_second_order", False):
        raise InputError(f"optimizer={settings.name}: needs second derivatives, which this training does not compute")
    return built


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimizer remembers: tensors by `<parameter>/<name>`, and plain values.

    Raises:
        InputError: If it remembers anything else, so that a training could not go on.
    """
    state = optimizer.state_dict()
    held = {f"{number}/{name}": value for number, own in state["state"].items() for name, value in own.items()}
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
    if odd := [name for name, value in plain.items() if value is not None and not _is_plain(value)]:
        kind = type(optimizer).__name__
        raise InputError(f"optimizer: {kind} keeps {odd[0]}, which can't be stored; choose another recover.optimizer")
    groups = [
        {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in group.items()
            if _is_plain(value)
        }
        for group in state["param_groups"]
    ]
    return tensors, {"state": plain, "groups": groups}


def restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put back, in place, what `state_of` gave."""
    moments: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **facts["state"]}.items():
        number, _, leaf = name.partition("/")
        moments.setdefault(int(number), {})[leaf] = value
    fresh = optimizer.state_dict()
    groups = [{**own, **left} for own, left in zip(fresh["param_groups"], facts["groups"], strict=True)]
    optimizer.load_state_dict({**fresh, "state": moments, "param_groups": groups})


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
