"""Dropping tokens: what a rule may choose by, what a rule owes, and the description that a model keeps.

Shapes: B samples, T tokens of the longest, S tokens of all samples together, D width, H heads, dh head width.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from models.merging import Half
from utils.errors import InputError

Need = Literal["attention", "received", "values"]
Batching = Literal["pad", "pack", "mask"]
Fuse = Literal["none", "sum", "mean"]
# rules are built on a file's word from here only
RULES = "prune."


@dataclass(frozen=True)
class Signals:
    """What is known of every token where a block decides.

    Leading dimensions are (B, T), or (S,) for packed tokens; a rule scores token by token.

    Attributes:
        layer: Position of the block, from 0.
        tokens: The tokens, (..., D).
        positions: Where each one stood among its sample's tokens, (...), int64; -1 for a fused one.
        values: What the attention of this block mixes, (..., H, dh); None unless needed.
        attention: What the first token pays to each, (..., H); None unless needed.
        received: What the tokens of the sample pay to each, their mean over heads and tokens, (...); None
            unless needed.
    """

    layer: int
    tokens: Tensor
    positions: Tensor
    values: Tensor | None = None
    attention: Tensor | None = None
    received: Tensor | None = None


class Rule(Protocol):
    """Which tokens stay, step by step; a step is one of the blocks that drop tokens.

    Attributes:
        needs: What it must see beside the tokens.
        name: Short name for messages.
        exact: Whether `most` is always reached, so that the shapes are known ahead.
    """

    needs: ClassVar[frozenset[Need]]
    exact: ClassVar[bool]
    name: ClassVar[str]

    @property
    def steps(self) -> int:
        """Number of steps it has amounts for."""
        ...

    def idle(self, step: int) -> bool:
        """Whether a step keeps everything whatever comes."""
        ...

    def most(self, eligible: int, step: int) -> int:
        """Most tokens that stay of so many eligible ones."""
        ...

    def scores(self, signals: Signals) -> Tensor:
        """Higher means keep, (...), float32."""
        ...

    def chosen(self, scores: Tensor, eligible: Tensor, step: int) -> Tensor:
        """Which tokens stay, (B, T) bool, by scores (B, T); those not eligible are not its matter."""
        ...

    def settings(self) -> dict[str, Any]:
        """What it is built with, as plain values."""
        ...


@dataclass(frozen=True)
class Keeping:
    """Where a network drops tokens, by which rule, and how what is left is batched.

    Attributes:
        rule: Which tokens stay.
        layers: The blocks that drop tokens, ascending: one a step of the rule.
        blocks: Blocks of the network.
        before: Half of the block that tokens go before.
        batching: `pad` to the longest sample with a key mask, `pack` all samples' tokens one after the
            other, or `mask`, which leaves every token where it is and saves nothing.
        fuse: Whether the dropped tokens of a sample leave one token: their sum or their mean, by scores.
        special: Token ids that are never dropped.
    """

    rule: Rule
    layers: tuple[int, ...]
    blocks: int
    before: Half = "mlp"
    batching: Batching = "pad"
    fuse: Fuse = "none"
    special: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if list(self.layers) != sorted({*self.layers} & {*range(self.blocks)}):
            raise InputError(f"layers={list(self.layers)}: must ascend without repeats in [0, {self.blocks})")
        if self.rule.steps != len(self.layers):
            raise InputError(f"layers={list(self.layers)}: the rule has amounts for {self.rule.steps} of them")
        for name, given, known in (
            ("before", self.before, ("mlp", "attention")),
            ("batching", self.batching, ("pad", "pack", "mask")),
            ("fuse", self.fuse, ("none", "sum", "mean")),
        ):
            if given not in known:
                raise InputError(f"{name}={given!r}: must be one of {', '.join(known)}")
        if self.before == "attention" and self.rule.needs:
            raise InputError(f"before=attention: {self.rule.name} looks at the attention of the block, it comes later")

    @property
    def merges(self) -> bool:
        """Whether any token goes."""
        return not all(self.rule.idle(step) for step in range(len(self.layers)))

    @property
    def data_dependent(self) -> bool:
        """Whether samples of one length may keep different numbers of tokens."""
        return self.merges and not self.rule.exact

    def refuse_misfit(self, blocks: int) -> None:
        """Raise an InputError if it is not for a network of that many blocks."""
        if self.blocks != blocks:
            raise InputError(f"blocks={self.blocks}: the network has {blocks} blocks")

    def counts(self, tokens: int, protected: int) -> list[tuple[int, int]]:
        """Tokens that enter the attention and the MLP of each block, at most; exactly, for an exact rule.

        Args:
            tokens: Tokens that enter the first block, the protected ones included.
            protected: Tokens that are never dropped.
        """
        found, step = [], 0
        for block in range(self.blocks):
            left = tokens
            if block in self.layers:
                left = protected + min(self.rule.most(tokens - protected, step), tokens - protected)
                left += self.fuse != "none" and left < tokens
                step += 1
            found.append((tokens if self.before == "mlp" else left, left))
            tokens = left
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        kind = type(self.rule)
        return {
            "rule": f"{kind.__module__}.{kind.__qualname__}", "settings": self.rule.settings(),
            "layers": list(self.layers), "blocks": self.blocks, "before": self.before,
            "batching": self.batching, "fuse": self.fuse, "special": list(self.special),
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Any) -> "Keeping":
        """Undo `to_json`; refuses anything else with an InputError."""
        if not isinstance(found, Mapping) or found.keys() != {"settings", *cls.__dataclass_fields__}:
            raise InputError(f"a rule for tokens has the keys settings, {', '.join(cls.__dataclass_fields__)}")
        whole = all(isinstance(found[key], list) and all(type(i) is int for i in found[key]) for key in _LISTS)
        if not whole or type(found["blocks"]) is not int or not isinstance(found["settings"], Mapping):
            raise InputError("layers, blocks and special must be whole numbers, and settings a mapping")
        return cls(
            _rule_of(str(found["rule"]), found["settings"]), tuple(found["layers"]), found["blocks"],
            found["before"], found["batching"], found["fuse"], tuple(found["special"]),
        )  # fmt: skip


_LISTS = ("layers", "special")


def _rule_of(name: str, settings: Mapping[str, Any]) -> Rule:
    module, _, kind = name.rpartition(".")
    if not module.startswith(RULES):
        raise InputError(f"rule={name}: is from outside this package, and is not built on a file's word")
    try:
        return getattr(importlib.import_module(module), kind)(**settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"rule={name}: cannot be built with {dict(settings)}: {error}") from error
