"""The published loops of Wanda and SparseGPT, written anew from their descriptions; what ours is compared with.

Wanda (Sun et al., 2024): one sample at a time, two forwards a block, a hook on every linear, a full stable sort.
N:m: one selection after the other over the groups of columns. SparseGPT (Frantar and Alistarh, 2023): a Gram matrix
for every linear, factored, inverted and factored again, and one column after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.base import DataBundle
from models.base import PrunableModel
from prune.weights.masks import Pattern

Add = Callable[[Tensor, Tensor, int], Tensor]
DAMPING = 0.01


class _Stop(Exception):
    pass


def first_inputs(model: PrunableModel, data: DataBundle) -> list[tuple[Tensor, dict[str, Any]]]:
    """What block 0 is given, sample by sample."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0], kwargs))
        raise _Stop

    handle = model.network.get_submodule(model.blocks()[0]).register_forward_pre_hook(catch, with_kwargs=True)
    for batch in data.calibration:
        for ids in batch["input_ids"].split(1):
            try:
                model.logits({"input_ids": ids.to(model.device)})
            except _Stop:
                pass
    handle.remove()
    return found


def published_walk(
    model: PrunableModel,
    data: DataBundle,
    start: Callable[[int], Tensor],
    add: Add,
    prune: Callable[[nn.Linear, Tensor], None],
) -> None:
    """The published schedule, in place."""
    given = first_inputs(model, data)
    for name in model.blocks():
        block = model.network.get_submodule(name)
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        sums = {id(module): start(module.in_features).to(model.device) for module in linears}
        counts = dict.fromkeys(sums, 0)

        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, sums: dict = sums, counts: dict = counts):
            sums[id(module)] = add(sums[id(module)], args[0].flatten(0, 1).T.float(), counts[id(module)])
            counts[id(module)] += 1

        handles = [module.register_forward_hook(note) for module in linears]
        for x, kwargs in given:
            block(x, **kwargs)
        for handle in handles:
            handle.remove()
        for module in linears:
            prune(module, sums[id(module)])
        given = [(block(x, **kwargs), kwargs) for x, kwargs in given]


def published_wanda(model: PrunableModel, data: DataBundle, share: float) -> None:
    def add(mean: Tensor, x: Tensor, count: int) -> Tensor:
        return mean * (count / (count + 1)) + torch.norm(x, p=2, dim=1) ** 2 / (count + 1)

    def prune(module: nn.Linear, mean: Tensor) -> None:
        scores = module.weight.abs() * mean.reshape(1, -1).sqrt()
        order = torch.sort(scores, dim=-1, stable=True)[1]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(1, order[:, : int(scores.shape[1] * share)], True)
        module.weight[mask] = 0

    published_walk(model, data, torch.zeros, add, prune)


def published_sparsegpt(model: PrunableModel, data: DataBundle, share: float) -> None:
    def add(gram: Tensor, x: Tensor, count: int) -> Tensor:
        gram *= count / (count + 1)
        x = (2 / (count + 1)) ** 0.5 * x
        gram += x @ x.T
        return gram

    def prune(module: nn.Linear, gram: Tensor) -> None:
        module.weight.copy_(published_columns(module.weight.float(), published_factor(gram), share))

    published_walk(model, data, lambda n: torch.zeros(n, n), add, prune)


def published_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Gram matrix's inverse, (I, I)."""
    h = gram.clone()
    h.diagonal().add_((h.diagonal() == 0).float())
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def published_columns(weight: Tensor, upper: Tensor, share: float, width: int = 128) -> Tensor:
    """One column after the other, in the orientation of the layer."""
    weight = weight.clone()
    losses = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        block, inverse = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        saliency = block**2 / inverse.diagonal().reshape(1, -1) ** 2
        mask = saliency <= saliency.flatten().sort()[0][int(saliency.numel() * share) - 1]
        for j in range(stop - start):
            w, d = block[:, j], inverse[j, j]
            q = w.clone()
            q[mask[:, j]] = 0
            kept[:, j] = q
            losses[:, start + j] = (w - q) ** 2 / d**2
            error = (w - q) / d
            block[:, j:] -= error.unsqueeze(1).matmul(inverse[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:stop] = kept
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return weight


def loop_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """One selection a group of columns."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], pattern.of):
        chosen = torch.topk(scores[:, start : start + pattern.of], pattern.zeros, dim=1, largest=False)[1]
        mask.scatter_(1, start + chosen, True)
    return mask
