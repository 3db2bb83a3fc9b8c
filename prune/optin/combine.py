"""From raw losses to one score a unit, at search time: pure functions (OPTIN's clean rule)."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Loss = Literal["md", "kd", "md+kd"]
Terms = Mapping[str, Mapping[str, Tensor]]
TOKEN = "token"


class Scored(Protocol):
    """What is scored together: a unit group, or the token positions of a layer."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102


class Positions(NamedTuple):
    """The token positions of one layer."""

    name: str
    layer: int
    kind: str = TOKEN


def combined(
    terms: Terms, groups: Sequence[Scored], layers: int, loss: Loss, lambda_c: float, constant: float | None
) -> dict[str, Tensor]:
    """`M / (number of terms) + c * KD`, with one constant c a kind of unit.

    `c = lambda_c * mean(M / terms) / mean(KD)` over all units of the kind, 0 where every KD is.

    Args:
        terms: Raw `md`, `kd` and, where there is one, `md_final`; per group (count,).
        groups: What was scored: unit groups, and token positions where they are.
        layers: Number of blocks.
        loss: Which losses count.
        lambda_c: Weight of the logits' loss beside the features'.
        constant: A literal c in place of the one derived from `lambda_c`.

    Returns:
        Per group (count,), higher means keep.
    """
    final = "md_final" in terms
    distances = {
        g.name: (terms["md"][g.name] + (terms["md_final"][g.name] if final else 0.0)) / terms_of(g, layers, final)
        for g in groups
    }
    if loss == "md":
        return distances
    if loss == "kd":
        return {g.name: terms["kd"][g.name] for g in groups}
    weights = {kind: constant if constant is not None else _weight(distances, terms["kd"], groups, kind, lambda_c)
               for kind in {g.kind for g in groups}}  # fmt: skip
    return {g.name: distances[g.name] + weights[g.kind] * terms["kd"][g.name] for g in groups}


def terms_of(group: Scored, layers: int, final: bool) -> int:
    """How many feature points a unit's distance sums over: those behind its layer, and the final one.

    The last layer has its own in place of those behind it; where there is a final one, its own
    lies before its units and is always 0, but not before its tokens.
    """
    behind = layers - 1 - group.layer + final
    return behind + 1 if group.kind == TOKEN and group.layer == layers - 1 else max(1, behind)


def _weight(
    distances: Mapping[str, Tensor], kd: Mapping[str, Tensor], groups: Sequence[Scored], kind: str, lambda_c: float
) -> float:
    names = [g.name for g in groups if g.kind == kind and len(kd[g.name])]
    if not names:
        return 0.0
    distance, deviation = (float(torch.cat([found[n] for n in names]).double().mean()) for found in (distances, kd))
    return lambda_c * distance / deviation if deviation > 0 else 0.0


def decayed(
    scores: Mapping[str, Tensor], groups: Sequence[Scored], layers: int,
    by_kind: Mapping[str, float], last_layer: Mapping[str, float],
) -> dict[str, Tensor]:  # fmt: skip
    """Multiply scores by a factor a kind of unit, and by another in the last layer."""
    last = {g.name for g in groups if g.layer == layers - 1}
    factors = {
        g.name: by_kind.get(g.kind, 1.0) * (last_layer.get(g.kind, 1.0) if g.name in last else 1.0) for g in groups
    }
    return {name: scores[name] * factor for name, factor in factors.items()}
