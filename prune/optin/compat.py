"""OPTIN as its released code selects: combination, prior, MAC accounting and search, quirks included.

The quirks are those of the release of September 2024 (see docs/optin_compat.md); what the clean
mode does in their place is in `combine.py` and `search.py`. Scores here are positive, higher
means keep, where the release stores them negated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import PrunableModel, UnitGroup
from prune.optin.combine import TOKEN, Loss, Scored, Terms
from prune.tokens.costs import weights_per_unit

# mean lengths of the development sets that the release counts with
LENGTHS = {
    "stsb": 31.47, "mrpc": 53.24, "rte": 64.59, "sst2": 25.16,
    "qqp": 30.55, "qnli": 50.97, "cola": 11.67, "mnli": 39.05,
}  # fmt: skip
PRIORS = {"head": 10.0, "neuron": 100.0}


@dataclass(frozen=True)
class Rule:
    """Settings of the released combination.

    Attributes:
        loss: Which losses count.
        lambda_: Their `lambda_contribution`, the inverse of `lambda_c`.
        vision: Whether the vision path is taken, else the language path.
        envelope: Factor on token distances, growing from 1 in the first layer to this in the last.
        final: Per kind, whether the last layer's own feature point counts (language).
        grams: Per kind the rows of its Gram, by which `aggregate=mean` divides twice; none for the sum.
    """

    loss: Loss
    lambda_: float
    vision: bool
    envelope: float = 1.0
    final: Mapping[str, bool] | None = None
    grams: Mapping[str, float] | None = None


def combined(terms: Terms, groups: Sequence[Scored], layers: int, rule: Rule) -> dict[str, Tensor]:
    """`M + c KD` per unit, c a power of ten that each unit finds for itself, or takes from those before it.

    Layer by layer, neurons before tokens. `c = 10 ^ trunc(log10 M - log10 KD - log10 lambda)` where
    M > KD > 0, and is remembered; else the mean of those remembered (1 if none), or on the vision
    path of neurons and tokens 1 where KD is not 0.

    Args:
        terms: Raw `md` and `kd`, per group (count,); a `md_final` is not looked at.
        groups: What was scored.
        layers: Number of blocks.
        rule: See `Rule`.

    Returns:
        Per group (count,).
    """
    memory: dict[str, list[float]] = {}
    found = {}
    for group in sorted(groups, key=lambda g: (g.layer, g.kind == TOKEN)):
        size = (rule.grams or {}).get(group.kind, 1.0)
        distances = (_distances(terms["md"][group.name], group, layers, rule) / size**2).tolist()
        divergences = terms["kd"][group.name].double().tolist()
        # heads remember by themselves, neurons and tokens together
        remembered = memory.setdefault("head" if group.kind == "head" else "others", [])
        lone = rule.vision and group.kind != "head"
        if rule.loss == "md":
            scores = distances
        elif rule.loss == "kd":
            scores = divergences
        else:
            pairs = zip(distances, divergences, strict=True)
            scores = [m + _constant(m, kd, rule.lambda_, remembered, lone) * kd for m, kd in pairs]
        found[group.name] = torch.tensor(scores, dtype=torch.float64)
    return found


def _distances(md: Tensor, group: Scored, layers: int, rule: Rule) -> Tensor:
    md = md.double()
    if group.kind == TOKEN:
        return md * rule.envelope ** (group.layer / max(1, layers - 1))
    if group.layer < layers - 1:
        return md
    # the last layer's only term; the vision path always adds it, and with distances alone it comes twice
    own = 1 if rule.vision or (rule.final or {}).get(group.kind, True) else 0
    return md * (own + (rule.loss == "md"))


def _constant(distance: float, divergence: float, lambda_: float, remembered: list[float], lone: bool) -> float:
    usual = sum(remembered) / len(remembered) if remembered else 1.0
    if distance <= divergence:
        return 1.0 if lone else usual
    if divergence <= 0:
        return usual
    constant = 10.0 ** math.trunc(math.log10(distance) - math.log10(divergence) - math.log10(lambda_))
    remembered.append(constant)
    return constant


def prior(groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """The language path's factors by index: 10 to 1 over heads, 100 to 1 over neurons, geometric."""
    return {
        g.name: PRIORS[g.kind] ** (1 - torch.arange(g.count, dtype=torch.float64) / max(1, g.count - 1)) for g in groups
    }


@dataclass(frozen=True)
class Accounting:
    """MACs as the release counts them: the encoder alone, at one length.

    Attributes:
        length: Tokens T; a mean, so not whole.
        per_token: Weights of one unit, per kind.
        per_pair: Features of a head's token-by-token products.
        counts: Units per group.
        kinds: Kind of each group.
        layers: Layer of each group.
    """

    length: float
    per_token: Mapping[str, int]
    per_pair: Mapping[str, int]
    counts: Mapping[str, int]
    kinds: Mapping[str, str]
    layers: Mapping[str, int]

    @classmethod
    def of(cls, model: PrunableModel, length: float) -> "Accounting":
        """Count a model's units, which must be one size a kind."""
        groups = model.unit_groups()
        kinds = {g.name: g.kind for g in groups}
        counts, layers = {g.name: g.count for g in groups}, {g.name: g.layer for g in groups}
        pairs = {g.kind: g.pairwise_features for g in groups}
        weights = {g.kind: weights_per_unit(model, g) for g in groups}
        return cls(length, weights, pairs, counts, kinds, layers)

    def unit(self, kind: str, length: float | None = None) -> float:
        """MACs of one unit at a length: `4 T d dh + 2 T^2 dh` for a head, `2 T d` for a neuron."""
        at = self.length if length is None else length
        return self.per_token[kind] * at + self.per_pair[kind] * at**2

    def total(self, kept: Mapping[str, int] | None = None, lengths: Sequence[float] | None = None) -> float:
        """MACs with so many units kept per group (default all), at one length a layer (default the same)."""
        counts = self.counts if kept is None else kept
        return sum(
            count * self.unit(self.kinds[name], lengths[self.layers[name]] if lengths else None)
            for name, count in counts.items()
        )


def why_not_counted(model: PrunableModel) -> str | None:
    """Why the release's search can't price a model's units, in one line; None if it can."""
    groups = model.unit_groups()
    if (kinds := sorted({group.kind for group in groups})) != ["head", "neuron"]:
        return f"the released search chooses heads and neurons, the units of model={model.name} are {', '.join(kinds)}s"
    sizes = {kind: {weights_per_unit(model, g) for g in groups if g.kind == kind and g.count} for kind in kinds}
    if uneven := next((kind for kind in kinds if len(sizes[kind]) > 1), None):
        return f"the released search has one price a {uneven}, model={model.name} has {len(sizes[uneven])} sizes"
    return None


def searched(
    scores: Mapping[str, Tensor], accounting: Accounting, capacity: float, overshoot: bool
) -> dict[str, Tensor]:
    """The released search: the top h heads and the best neurons that fit, for the h with the largest sum.

    A number of heads that does not fit by itself stays eligible, with no neurons.

    Args:
        scores: Per group of heads and neurons (count,).
        accounting: MACs of the units.
        capacity: MACs that may be left.
        overshoot: Whether one neuron more is taken than fits, as on the vision path.

    Returns:
        Ascending indices of the kept units per group, int64.
    """
    heads, neurons = (_ranked(scores, accounting, kind) for kind in ("head", "neuron"))
    sums = [_sums(scores, units) for units in (heads, neurons)]
    price = {kind: accounting.unit(kind) for kind in ("head", "neuron")}

    def beside(h: int) -> int:
        room = capacity - h * price["head"]
        return 0 if room < 0 else min(len(neurons), math.floor(room / price["neuron"]) + overshoot)

    best = max(range(1, len(heads) + 1), key=lambda h: float(sums[0][h] + sums[1][beside(h)]))
    kept: dict[str, list[int]] = {name: [] for name in accounting.counts}
    for name, unit in [*heads[:best], *neurons[: beside(best)]]:
        kept[name].append(unit)
    return {name: torch.tensor(sorted(units), dtype=torch.int64) for name, units in kept.items()}


def _ranked(scores: Mapping[str, Tensor], accounting: Accounting, kind: str) -> list[tuple[str, int]]:
    """Units of a kind, most important first; equal ones in layer and index order."""
    units = [
        (-score, name, unit)
        for name, k in accounting.kinds.items() if k == kind
        for unit, score in enumerate(scores[name].tolist())
    ]  # fmt: skip
    return [(name, unit) for _, name, unit in sorted(units, key=lambda row: row[0])]


def _sums(scores: Mapping[str, Tensor], units: Sequence[tuple[str, int]]) -> Tensor:
    values = [float(scores[name][unit]) for name, unit in units]
    return torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)


def nested_counts(cleared: Sequence[set[int]], tokens: int) -> list[int]:
    """Tokens that the release counts in each layer, given the positions cleared there.

    A layer keeps its own positions that the layer before kept, too; where its own are as many as
    that layer's or more, or at most a tenth of all, it inherits the layer before.
    """
    before, counts = set(range(tokens)), []
    for gone in cleared:
        own = set(range(tokens)) - gone
        if not (len(own) >= len(before) or len(own) <= 0.1 * tokens):
            before = own & before
        counts.append(len(before))
    return counts


def released_walk(
    scores: Tensor, accounting: Accounting, kept: Mapping[str, int], to_remove: float
) -> tuple[list[int], bool]:
    """Clear token entries of layers 1 and later, least important first, until so many MACs are gone.

    Args:
        scores: Higher means keep, (L, T).
        accounting: MACs of the units; a layer's length is its tokens without one.
        kept: Units kept per group.
        to_remove: MACs to go.

    Returns:
        Tokens per layer, the first one included, and whether the MACs went.
    """
    layers, tokens = scores.shape
    cleared: list[set[int]] = [set() for _ in range(layers)]
    counts = nested_counts(cleared, tokens)
    start = accounting.total(kept, [count - 1 for count in counts])
    for at in scores[1:].flatten().argsort(stable=True).tolist():
        if start - accounting.total(kept, [count - 1 for count in counts]) >= to_remove:
            return counts, True
        cleared[1 + at // tokens].add(at % tokens)
        counts = nested_counts(cleared, tokens)
    return counts, start - accounting.total(kept, [count - 1 for count in counts]) >= to_remove


def released_schedule(counts: Sequence[int]) -> tuple[int, ...]:
    """What the release executes: each layer's reduction one layer late, after the attention; the last never."""
    return tuple(0 if layer < 2 else counts[layer - 2] - counts[layer - 1] for layer in range(len(counts)))
