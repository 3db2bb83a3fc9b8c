"""MACs per sample: the analytic count, held against torch's counter; fvcore's figure beside it.

fvcore counts one MAC as one FLOP, adds norms, and has no handler for scaled dot-product
attention, so it leaves the attention products out. Its figure is there because earlier
work quotes it, under its own name, and is never the primary one.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evals.base import Measurement, Measurements, Subject
from models.base import Batch, PrunableModel
from models.cost import CostModel, cost_model
from models.keeping import Keeping
from models.merging import Reduction
from models.token_use import seen_of, token_use
from utils.errors import RunError

TOLERANCE = 0.01


@dataclass(frozen=True)
class Macs:
    """MACs of one sample at the bundle's example length.

    `flops` is twice the MACs. `matching` is what a model that merges tokens spends on finding out
    which, and `scoring` what one that drops tokens spends on rows of attention that it looks at; they are
    no part of the MACs, as in published figures. Where the data decides how many tokens stay, the MACs are
    the mean over the validation split as batched, with the ideal and its 95th percentile beside it
    (`models/token_use.py`). A disagreement above 1% between the
    analytic count and torch's `FlopCounterMode` ends the run: one of the two is wrong.
    """

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Count each model."""
        return [self._count(subject) for subject in subjects]

    def _count(self, subject: Subject) -> Measurements:
        model, example = subject.model, subject.data.example
        costs = cost_model(model, example)
        analytic, matching = costs.total("macs"), matching_macs(model, costs) + scoring_macs(model, costs, example)
        counted = counted_macs(model, example)
        if abs(analytic + matching - counted) > TOLERANCE * max(counted, 1):
            raise RunError(
                f"evals.macs: {analytic + matching:,} MACs by the closed form but {counted:,} by FlopCounterMode for "
                f"{model.name}; they must agree within {TOLERANCE:.0%}"
            )
        details = {"flops": 2 * analytic, "flop_counter": counted}
        if isinstance(model.reduction, Reduction):
            details["matching"] = matching
        value: float = analytic
        if isinstance(model.reduction, Keeping):
            assert costs.dropping is not None
            use = token_use(model, subject.data.validation)
            value = use.typical(costs.dropping, analytic, seen_of(model, example).width)
            details |= {"flops": 2 * value, "scoring": matching, **use.figures(costs.dropping)}
        if "input_ids" in example:
            details["tokens"] = example["input_ids"].shape[1]
        return {
            "macs": Measurement(value, "MAC/sample", details=details),
            "fvcore_flops": _fvcore_flops(model, example),
        }


def matching_macs(model: PrunableModel, costs: CostModel) -> int:
    """MACs that a model spends on comparing tokens with each other; 0 if it merges none."""
    if not isinstance(model.reduction, Reduction) or costs.tokens is None:
        return 0
    return costs.tokens.matching(model.reduction)


def scoring_macs(model: PrunableModel, costs: CostModel, example: Batch) -> int:
    """MACs that a model spends on scoring tokens before it drops some; 0 if it drops none."""
    if not isinstance(model.reduction, Keeping) or costs.dropping is None:
        return 0
    seen = seen_of(model, example)
    return costs.dropping.scoring(model.reduction, seen.executed, seen.fused)


def counted_macs(model: PrunableModel, example: Batch) -> int:
    """MACs of a forward pass by torch's dispatcher-level counter (2 FLOPs per MAC).

    The counter is tried on a known attention call first: some builds return 0 or double it.
    """
    _self_test()
    with torch.no_grad(), _without_gradients(model.network), FlopCounterMode(display=False) as counter:
        model.logits(model.place(example))
    return counter.get_total_flops() // 2


@contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """No weight needs a gradient for the block: the counter fails on an expanded one that does (learned queries)."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _self_test() -> None:
    q = torch.zeros(1, 8, 128, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(q, q, q)
    if (found := counter.get_total_flops()) != 33_554_432:
        raise RunError(
            f"torch {torch.__version__} counts {found:,} FLOPs for an attention call of 33,554,432; "
            "this build's FlopCounterMode can't be trusted, use another one"
        )


class _Positional(nn.Module):
    """Gives fvcore's tracer a module with positional tensors."""

    def __init__(self, model: PrunableModel, names: list[str]) -> None:
        super().__init__()
        self.network, self.model, self.names = model.network, model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model.logits(dict(zip(self.names, tensors, strict=True)))


def _fvcore_flops(model: PrunableModel, example: Batch) -> Measurement:
    unit = "fvcore FLOP/sample"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from fvcore.nn import FlopCountAnalysis

            placed = model.place(example)
            analysis = FlopCountAnalysis(_Positional(model, list(placed)), tuple(placed.values()))
            logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            with torch.no_grad():
                total = int(analysis.total())
            missed = {str(op): int(times) for op, times in analysis.unsupported_ops().items()}
        except Exception as error:  # a third party's tracer may fail on any model: say so, go on
            return Measurement(None, unit, reason=f"fvcore failed: {type(error).__name__}: {error}")
    return Measurement(total, unit, details={"uncounted_operators": missed})
