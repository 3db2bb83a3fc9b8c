"""The one place that registers and removes hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Hook = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def hooked(before: Iterable[Hook] = (), after: Iterable[Hook] = ()) -> Iterator[None]:
    """Run a block with hooks in place; every one is removed whatever happens.

    Args:
        before: Pairs of module and forward pre-hook, `hook(module, args)`.
        after: Pairs of module and forward hook, `hook(module, args, output)`.
    """
    with ExitStack() as stack:
        for module, hook in before:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for module, hook in after:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def is_hooked(network: nn.Module) -> bool:
    """Whether any module of the network carries a forward or backward hook."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in network.modules()
    )


def drop_hooks(network: nn.Module) -> None:
    """Take away the forward hooks that a library left on a network as it built it."""
    for module in network.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def is_replayed(network: nn.Module) -> bool:
    """Whether any module of the network answers by another function (`replaying`)."""
    return any("forward" in vars(module) for module in network.modules())


@contextmanager
def watched(network: nn.Module, names: Iterable[str], watch: Callable[[str, Any], None]) -> Iterator[None]:
    """Show what named modules give to a function, which takes the name and the output."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: watch(name, output)

    with hooked(after=[(network.get_submodule(name), hook_of(name)) for name in names]):
        yield


@contextmanager
def captured(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules by name; the last call of each wins."""
    found: dict[str, Tensor] = {}
    with watched(network, names, found.__setitem__):
        yield found


@contextmanager
def replaying(network: nn.Module, answers: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Run a block with named modules answering by other functions instead of computing.

    Everything between them (masks, rotary tables, residual sums) stays the network's own.

    Args:
        network: Owner of the modules.
        answers: Per module name what its `forward` is meanwhile.
    """
    modules = [(network.get_submodule(name), answer) for name, answer in answers.items()]
    if any("forward" in vars(module) for module, _ in modules):
        raise RuntimeError("a module answers by another function already; leave that context first")
    try:
        for module, answer in modules:
            module.forward = answer
        yield
    finally:
        for module, _ in modules:
            vars(module).pop("forward", None)
