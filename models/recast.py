"""Giving a module another class: the same weights and submodules under another forward."""

from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def recast(module: nn.Module, kind: type[M], **attributes: Any) -> M:
    """A module of another class with the same submodules, weights, hooks and settings.

    Args:
        module: Must not be used any more.
        kind: A subclass of its class, or the class itself.
        attributes: What the new module has beyond the old one.
    """
    made = kind.__new__(kind)
    vars(made).update(vars(module))
    # tables of its own, so that what is replaced in one module is not in the other
    vars(made).update({name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")})
    vars(made).update(attributes)
    return made
