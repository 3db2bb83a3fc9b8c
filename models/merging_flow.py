"""Merging tokens on their way through a network: what its blocks tell each other, whatever the architecture.

The maths is in `models/merging.py`.

Shapes: B samples, T tokens, P protected ones in front (CLS, distillation, registers), D width, H heads, dh head width.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from models.merging import Reduction, match, merge, mergeable, places, reluctance
from utils.errors import RunError

if TYPE_CHECKING:
    from models.base import PrunableModel


class FrontQueries(nn.Linear):
    """One projection to queries, keys and values, of which queries are wanted of the first tokens alone.

    Attributes:
        front: Number of these tokens.
    """

    front: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., T, D) to (..., T, 3 H dh), with zeros in the place of the queries that nobody wants."""
        features, bias = self.weight.shape[0] // 3, self.bias
        parts = (None, None) if bias is None else (bias[:features], bias[features:])
        queries = linear(x[..., : self.front, :], self.weight[:features], parts[0])  # (..., P, H*dh)
        rest = linear(x, self.weight[features:], parts[1])  # (..., T, 2*H*dh)
        return torch.cat([pad(queries, (0, 0, 0, x.shape[-2] - queries.shape[-2])), rest], dim=-1)


class Flow:
    """What the blocks of one network tell each other during one forward pass; they share it.

    Attributes:
        reduction: The schedule.
        protected: Tokens in front that are never merged.
        averaged: Whether the network ends with `mean`, which needs the sizes after the last block.
        size: How many of the first tokens each token stands for, (B, T, 1); None as long as each
            stands for itself, so that the dense kernels run.
        tracked: Whether `source` is kept.
        source: Which token each of the first ones is part of by now, (B, T); None as long as each stands for itself.
    """

    _PASS: ClassVar[Mapping[str, Any]] = {"size": None, "source": None, "_keys": None, "_attention": None, "_layer": -1}

    def __init__(self, reduction: Reduction, protected: int, averaged: bool = False) -> None:
        self.reduction, self.protected, self.averaged = reduction, protected, averaged
        self.tracked = False
        self.size: Tensor | None = None
        self.source: Tensor | None = None
        self._keys: Tensor | None = None
        self._attention: Tensor | None = None
        self._layer = -1

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts anew, also from a pass that broke off
        return vars(self) | dict(self._PASS) | {"tracked": False}

    def held(self) -> dict[str, Any]:
        """What it knows of the pass that is under way."""
        return {name: getattr(self, name) for name in self._PASS}

    def resume(self, held: Mapping[str, Any] | None) -> None:
        """Go on with another pass that was interrupted between two operations; None: one that has not begun."""
        vars(self).update(self._PASS if held is None else held)

    def enter(self, x: Tensor, layer: int) -> Tensor:
        """Begin a block: (B, T, D), with fewer tokens if it merges before its attention."""
        if layer == 0:
            self.size = self.source = self._keys = self._attention = None
        elif layer != self._layer + 1:
            raise RunError(
                f"block {layer} ran after block {self._layer}: blocks of a network that merges tokens must run "
                "one after the other, each once; scores that replay some of them need a network without merging"
            )
        self._layer = layer
        return self._merged(x) if self.reduction.before == "attention" else x

    def in_front(self, layer: int) -> bool:
        """Whether a block asks and answers for the protected tokens alone."""
        return self.reduction.in_front(layer)

    def asking(self, x: Tensor) -> Tensor:
        """The tokens (B, T, D) for which the present block asks and answers: all, or the protected ones (B, P, D)."""
        return x[:, : self.protected] if self.in_front(self._layer) else x

    def leave_attention(self, x: Tensor) -> Tensor:
        """Between the halves of a block: (B, T, D), with fewer tokens if it merges before its MLP."""
        x = self._merged(x) if self.reduction.before == "mlp" else x
        if self._layer == len(self.reduction.merged) - 1 and not self.averaged:
            self.size = None  # nothing of a pass outlives it
        return x

    def leave(self, x: Tensor) -> Tensor:
        """End a block."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dense: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Mix values (B, H, T, dh) by the network's own attention, each token counted by its size.

        There are fewer queries than keys in a block that asks for some tokens alone.
        """
        self._note(q, k, scale)
        return dense(self.bias(q))

    def bias(self, x: Tensor) -> Tensor | None:
        """What proportional attention adds to the logits of each key, (B, 1, 1, T); None for nothing."""
        if self.size is None or not self.reduction.proportional:
            return None
        return self.size.log().to(x.dtype)[:, None, None, :, 0]  # (B, T, 1) -> (B, 1, 1, T)

    def _note(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Keep what the next merge looks at: the mean over heads of keys (B, H, T, dh), the class token's attention.

        An attention that has lost all heads has neither; tokens are then compared by themselves.
        """
        merged = self.reduction.merged
        following = self._layer + (self.reduction.before == "attention")
        wanted = following < len(merged) and merged[following] > 0 and k.shape[1] > 0
        wide = torch.promote_types(k.dtype, torch.float32)
        by_keys = wanted and self.reduction.metric == "keys"
        self._keys = k.detach().mean(dim=1, dtype=wide) if by_keys else None
        self._attention = self._of_class_token(q, k, scale) if wanted and self.reduction.importance else None

    def _of_class_token(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """What the first token attends to, the mean over heads, (B, T), float32 at least."""
        logits = (q.detach()[:, :, :1] * scale) @ k.detach().mT  # (B, H, 1, T)
        bias = self.bias(q)
        logits = logits if bias is None else logits + bias
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=1)[:, 0]

    def mean(self, x: Tensor, front: int) -> Tensor:
        """Mean over the tokens behind the first `front`, by size: (B, T, D) -> (B, D)."""
        size, self.size = self.size, None
        if size is None:
            return x[:, front:].mean(dim=1)
        weight = size[:, front:]
        wide = torch.promote_types(x.dtype, weight.dtype)
        return ((x[:, front:].to(wide) * weight).sum(dim=1) / weight.sum(dim=1)).to(x.dtype)

    def _merged(self, x: Tensor) -> Tensor:
        r = min(self.reduction.merged[self._layer], mergeable(x.shape[1], self.protected))
        keys, self._keys = self._keys, None
        attention, self._attention = self._attention, None
        if r == 0:
            return x
        size = self.size
        if size is None:
            size = x.new_ones((*x.shape[:2], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        against = reluctance(self.reduction, size, attention)
        matching = match(x if keys is None else keys, r, self.protected, against)
        if self.tracked:
            moved = places(matching, x.shape[1])
            self.source = moved if self.source is None else moved.gather(1, self.source)
        x, self.size = merge(x, size, matching)
        return x


def merging_flow(model: "PrunableModel") -> Flow | None:
    """What the blocks of a network that merges tokens share; None for one that merges none."""
    if not isinstance(model.reduction, Reduction):
        return None
    return model.network.get_submodule(model.blocks()[0]).flow  # type: ignore[return-value]
