"""Removing whole blocks from a network for real: those left move up, and what counts them follows."""

from collections.abc import Sequence
from typing import Any

from torch import nn

PER_LAYER = "layer_types"


def refuse_bad_blocks(kept: Sequence[int], count: int) -> None:
    """Raise a ValueError unless `kept` are ascending positions of a network's `count` blocks, one at least."""
    whole = all(type(position) is int and 0 <= position < count for position in kept)
    if not kept or not whole or list(kept) != sorted(set(kept)):
        raise ValueError(
            f"kept blocks are {list(kept)}; they must ascend without repeats in [0, {count}), one at least"
        )


def keep_listed(network: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> None:
    """Remove, in place, the blocks that are not kept.

    Args:
        network: The module to shorten.
        blocks: Names of all its blocks, the numbered children of one `nn.ModuleList` or `nn.Sequential`.
        kept: Positions of those that stay, ascending.

    Raises:
        ValueError: If the blocks are anything else.
    """
    parent = blocks[0].rpartition(".")[0]
    listed = network.get_submodule(parent)
    if not isinstance(listed, nn.ModuleList | nn.Sequential) or list(blocks) != [
        f"{parent}.{position}" for position in range(len(listed))
    ]:
        raise ValueError(f"blocks {blocks[0]} to {blocks[-1]} are not all that {parent or 'the network'} lists")
    for position in sorted(set(range(len(blocks))) - set(kept), reverse=True):
        del listed[position]


def keep_staged(network: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> None:
    """The same where blocks lie in the lists of several stages, one after the other; a stage may lose all of its own.

    Args:
        network: The module to shorten.
        blocks: Names of all its blocks, stage by stage.
        kept: Positions of those that stay, ascending.
    """
    stages: dict[str, list[int]] = {}
    for position, block in enumerate(blocks):
        stages.setdefault(block.rpartition(".")[0], []).append(position)
    for positions in stages.values():
        left = [number for number, position in enumerate(positions) if position in set(kept)]
        keep_listed(network, [blocks[position] for position in positions], left)


def shorten_transformer(network: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> None:
    """The same for a network of transformers: also its configuration, and the numbers by which layers find their cache.

    Args:
        network: The module to shorten.
        blocks: Names of all its blocks.
        kept: Positions of those that stay, ascending.
    """
    keep_listed(network, blocks, kept)
    for position, block in enumerate(blocks[: len(kept)]):
        for module in network.get_submodule(block).modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = position  # type: ignore[assignment]
    config: Any = network.config
    lists = {name: value for name, value in config.to_dict().items() if name.endswith(PER_LAYER)}
    for name, value in lists.items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, name, [value[position] for position in kept])
    config.num_hidden_layers = len(kept)
