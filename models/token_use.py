"""How many tokens a model that drops some really runs on: measured over data, since data decides it.

Shapes: B samples, L blocks; the last axis of counts holds attention and MLP.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.base import Batch, PrunableModel
from models.keeping_flow import Seen, flow_of, watched_tokens
from models.token_cost import TokenCosts
from utils.progress import followed


@dataclass(frozen=True)
class TokenUse:
    """Tokens of every sample of a split, block by block.

    Attributes:
        counts: Tokens that entered each half, (B, L, 2).
        executed: Tokens that each half was computed for, padding included, (B, L, 2).
        entered: Tokens before any went, (B,).
        width: The same with padding, (B,).
        known: Whether shapes alone decide how many stay.
    """

    counts: Tensor
    executed: Tensor
    entered: Tensor
    width: Tensor
    known: bool

    def typical(self, costs: TokenCosts, example: int, tokens: int) -> float | int:
        """MACs to quote: those of the example where shapes decide them, else their mean over the split as batched.

        Where samples differ in length, the mean share of the dense MACs is put on the example's length, for
        which the dense model's MACs are stated.

        Args:
            costs: Costs of the model's blocks.
            example: MACs that the example takes.
            tokens: Tokens of the example before any goes.
        """
        if self.known:
            return example
        mean = float(costs.totals(self.executed).double().mean())
        if bool((self.width == tokens).all()):
            return mean
        dense = float(costs.totals(_every(self.width, self.counts)).double().mean())
        return mean / dense * float(costs.totals(_every(torch.tensor([tokens]), self.counts[:1])))

    def figures(self, costs: TokenCosts) -> dict[str, Any]:
        """Tokens kept, and MACs: ideal, as batched, and dense without padding; mean and 95th percentile."""
        ideal = costs.totals(self.counts)
        waste = 1 - float(self.counts.double().sum() / self.executed.double().sum())
        return {
            "kept_tokens": summary(self.counts),
            "ideal": _figures(ideal),
            "executed": _figures(costs.totals(self.executed)),
            "dense_unpadded": _figures(costs.totals(_every(self.entered, self.counts))),
            "padding_waste": waste,
        }


@torch.inference_mode()
def token_use(model: PrunableModel, batches: Iterable[Batch]) -> TokenUse:
    """Run a split through a model that drops tokens, batched as it comes.

    Raises:
        RunError: If a score is not finite.
    """
    counts, executed, entered, width = [], [], [], []
    for seen in _passes(model, batches):
        counts.append(seen.counts.cpu())
        entered.append(seen.entered.cpu())
        rows = len(entered[-1])
        widths = torch.tensor(seen.executed).expand(rows, -1, -1)  # (L, 2) -> (B, L, 2)
        # packed samples are computed without padding, each its own tokens
        executed.append(torch.where(torch.tensor(seen.packed), counts[-1], widths))
        width.append(torch.full((rows,), seen.width))
    unpadded = all(bool((w == e).all()) for w, e in zip(width, entered, strict=True))
    known = flow_of(model).keeping.rule.exact and unpadded
    return TokenUse(torch.cat(counts), torch.cat(executed), torch.cat(entered), torch.cat(width), known)


def _passes(model: PrunableModel, batches: Iterable[Batch]) -> Iterable[Seen]:
    with watched_tokens(flow_of(model)) as flow:
        for batch in followed("token counts", batches):
            model.logits(model.place(batch))
            flow.check()
            assert flow.seen is not None
            yield flow.seen


@torch.inference_mode()
def seen_of(model: PrunableModel, example: Batch) -> Seen:
    """What one pass over one sample does."""
    (seen,) = _passes(model, [example])
    return seen


def summary(counts: Tensor) -> list[dict[str, Any]]:
    """Mean, 95th percentile and maximum of the tokens that enter each half, block by block, from (B, L, 2)."""
    return [
        {"layer": layer, "attention": _spread(counts[:, layer, 0]), "mlp": _spread(counts[:, layer, 1])}
        for layer in range(counts.shape[1])
    ]


def _spread(values: Tensor) -> dict[str, float]:
    return {**_figures(values), "max": float(values.max())}


def _figures(values: Tensor) -> dict[str, float]:
    wide = values.double()
    return {"mean": float(wide.mean()), "p95": float(wide.quantile(0.95))}


def _every(tokens: Tensor, like: Tensor) -> Tensor:
    """The same number of tokens in every half: (B,) -> (B, L, 2)."""
    return tokens[:, None, None].expand(len(tokens), *like.shape[1:])
