"""Two zeros in every four weights on torch's semi-structured kernels, only where they measure faster.

O outputs, I inputs of a linear's weight (O, I); M rows of its input.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from evals.timing import Protocol, time_interleaved
from models.base import PrunableModel

LEAST_CAPABILITY = (8, 0)
PROBE = Protocol(warmup=5, blocks=3, seconds=0.02, least_calls=30, most_calls=300)

Timer = Callable[[Tensor, Tensor, int], tuple[float, float]]


@dataclass(frozen=True)
class Probe:
    """One layer timed by both kernels.

    Attributes:
        name: Dotted name of the linear.
        dense_ms: Median of the dense product.
        sparse_ms: Median of the sparse one; None where torch refuses the weight.
        reason: Why it refuses it.
    """

    name: str
    dense_ms: float
    sparse_ms: float | None
    reason: str | None = None

    @property
    def faster(self) -> bool:
        """Whether the sparse kernel won."""
        return self.sparse_ms is not None and self.sparse_ms < self.dense_ms

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {**asdict(self), "used": self.faster}


def two_of_four(weight: Tensor) -> bool:
    """Whether every four consecutive inputs of every row (O, I) hold two zeros at least."""
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] % 4:
        return False
    return bool(((weight.detach().reshape(len(weight), -1, 4) == 0).sum(dim=-1) >= 2).all())


def sparse_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a network whose weights have two zeros in every four, by name."""
    named = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in named if two_of_four(module.weight)}


def why_not_sparse(model: PrunableModel) -> str | None:
    """Why no semi-structured kernel can serve a model here; None if one can."""
    if model.device.type != "cuda":
        return f"torch's semi-structured kernels run on CUDA alone, and this is a {model.device.type}"
    if (found := torch.cuda.get_device_capability(model.device)) < LEAST_CAPABILITY:
        return f"torch's semi-structured kernels need compute capability 8.0, and this device has {found[0]}.{found[1]}"
    if model.dtype not in (torch.float16, torch.bfloat16):
        name = str(model.dtype).removeprefix("torch.")
        return f"torch's semi-structured kernels take float16 and bfloat16, and the weights are {name}"
    return None if sparse_linears(model.network) else "no linear has two zeros in every four weights"


def timed(weight: Tensor, sparse: Tensor, rows: int) -> tuple[float, float]:
    """Median milliseconds of the dense and of the sparse product with an input (M, I), interleaved."""
    inputs = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    calls = [partial(linear, inputs, weight), partial(linear, inputs, sparse)]
    dense, other = time_interleaved(calls, weight.device, PROBE)
    return statistics.median(dense.all_ms), statistics.median(other.all_ms)


def probed(linears: Mapping[str, nn.Linear], rows: int, timer: Timer = timed) -> list[Probe]:
    """Time each layer by itself by both kernels.

    Args:
        linears: The layers by name.
        rows: Rows of their input, M: samples times tokens.
        timer: Times a dense weight against a sparse one; another one for tests.
    """
    return [_probe(name, module.weight.detach(), rows, timer) for name, module in linears.items()]


def _probe(name: str, weight: Tensor, rows: int, timer: Timer) -> Probe:
    try:
        dense_ms, sparse_ms = timer(weight, compressed(weight), rows)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # shapes and builds that torch does not serve
        return Probe(name, 0.0, None, next(iter(str(error).splitlines()), type(error).__name__))
    return Probe(name, dense_ms, sparse_ms)


def compressed(weight: Tensor) -> Tensor:
    """The same weight (O, I) in torch's semi-structured form."""
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight.contiguous())


@contextmanager
def sparse_kernels(linears: Mapping[str, nn.Linear], probes: Sequence[Probe]) -> Iterator[None]:
    """Run a block with the layers that won on sparse kernels; the dense weights come back afterwards."""
    won = [linears[probe.name] for probe in probes if probe.faster]
    dense = [module.weight for module in won]
    try:
        for module, weight in zip(won, dense, strict=True):
            module.weight = nn.Parameter(compressed(weight.detach()), requires_grad=False)
        yield
    finally:
        for module, weight in zip(won, dense, strict=True):
            module.weight = weight
