"""The weights that sparsity may touch: the linears inside a model's blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from models.base import PrunableModel
from utils.errors import InputError


@dataclass(frozen=True)
class Matrix:
    """One linear's weight, (outputs, inputs).

    Attributes:
        name: Dotted name of the linear in the network.
        layer: Position of its block, from 0.
        outputs: Rows.
        inputs: Columns.
    """

    name: str
    layer: int
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Solved:
    """What one linear loses.

    Attributes:
        removed: (O, I), bool.
        weight: New values with the zeros in place, (O, I); None leaves what stays as it is.
        facts: What else is to be recorded, as plain values.
    """

    removed: Tensor
    weight: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def linear_of(network: nn.Module, name: str) -> nn.Linear:
    """The linear of this name."""
    found = network.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def prunable_matrices(model: PrunableModel, skip: Sequence[str] = ()) -> tuple[Matrix, ...]:
    """All linears inside the blocks, block by block; so never an embedding or the head.

    Args:
        model: The model.
        skip: Patterns such as `*.down_proj` of names to leave dense.

    Raises:
        InputError: If nothing is left, a pattern matches nothing, or a weight is used elsewhere, too.
    """
    found = [m for layer, block in enumerate(model.blocks()) for m in _linears(model.network, layer, block)]
    for pattern in skip:
        if not any(fnmatchcase(matrix.name, pattern) for matrix in found):
            names = ", ".join(matrix.name for matrix in found[:8])
            raise InputError(f"prune.skip: {pattern!r} matches no linear; the model has {names or 'none'}, …")
    left = tuple(m for m in found if not any(fnmatchcase(m.name, pattern) for pattern in skip))
    if not left:
        raise InputError(
            f"model={model.name}: has no linear inside its blocks that may be pruned (prune.skip={list(skip)})"
        )
    _refuse_tied(model.network, left)
    return left


def _linears(network: nn.Module, layer: int, block: str) -> list[Matrix]:
    named = network.get_submodule(block).named_modules(prefix=block)
    linears = [(name, module) for name, module in named if isinstance(module, nn.Linear) and module.weight.numel()]
    return [Matrix(name, layer, *module.weight.shape) for name, module in linears]


def _refuse_tied(network: nn.Module, matrices: tuple[Matrix, ...]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for matrix in matrices:
        names = owners[id(linear_of(network, matrix.name).weight)]
        if len(names) > 1:
            raise InputError(
                f"{' and '.join(names)} are tied: pruning one would change the other; "
                f"leave {matrix.name} out by prune.skip"
            )
