"""Products of float32 matrices on a CPU by oneDNN, where torch itself takes the BLAS that it was built with.

That is MKL as a rule, which runs at half of oneDNN's speed on processors of other makers. Both compute in
float32; sums are taken in another order. Everything else is computed as torch does.

Shapes: N rows, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or None.

    Returns:
        (..., O).
    """
    if not _suits(x, weight):
        return functional.linear(x, weight, bias)
    # rows with gaps between them would be taken by a loop without vectors
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of (N, I) and (I, O), (N, O)."""
    if not _suits(left, right):
        return left @ right
    # a transposed matrix is taken as it lies, if it has no gaps
    columns = right.T if right.is_contiguous() else right.T.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left.contiguous(), columns, None, "none", [], "")


def quick_linears(network: nn.Module, block: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the linears of a block may answer by in the place of their own forward, by name."""
    inside = network.get_submodule(block).named_modules(prefix=block)
    return {name: _forward_of(module) for name, module in inside if _is_plain(module)}


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear that computes as torch's own does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Linear)

    def forward(input: Tensor) -> Tensor:
        return linear(input, module.weight, module.bias)

    return forward


def _suits(*tensors: Tensor) -> bool:
    """Whether these are plain float32 matrices in main memory, for which no gradient or other type is wanted."""
    return (
        all(
            t.device.type == "cpu" and t.dtype == torch.float32 and t.layout == torch.strided and t.numel() > 0
            and type(t) in (Tensor, nn.Parameter)
            for t in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _has_onednn()
    )  # fmt: skip


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Whether this build of torch has oneDNN, and the operation by which its compiler calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
