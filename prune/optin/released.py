"""Plans as OPTIN's released code makes them; its selections and its own accounting, with what really runs beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from models.base import PrunableModel
from models.cost import CostModel
from models.merging import Reduction
from prune.base import Plan, Scores
from prune.optin.combine import TOKEN, Loss, decayed
from prune.optin.compat import (
    Accounting,
    Rule,
    combined,
    prior,
    released_schedule,
    released_walk,
    searched,
)  # fmt: skip
from prune.optin.published import PUBLISHED
from prune.optin.tokens import by_layer, positions_of
from prune.tokens.costs import cut_costs
from utils.errors import InputError

# of the whole reduction, what heads and neurons give
SHARES = (0.15, 0.30)


@dataclass(frozen=True)
class Released:
    """Settings of the released search.

    Attributes:
        ratio: Fraction of the encoder's MACs to remove, one less their `mac_constraint`.
        loss: Which losses count.
        lambda_c: The inverse of their `lambda_contribution`.
        by_kind: Factor on all units of a kind.
        last_layer: Factor on those of the last layer.
        envelope: Factor on token distances that grows from 1 to this over the layers.
        mean: Whether distances are means over the Gram.
        final: Per kind, whether the last layer's own feature point counts.
        tokens: Whether tokens give a share, as in Tau.
        static_share: What heads and neurons give of it; None draws it as the release does.
        seed: Of that draw.
    """

    ratio: float
    loss: Loss
    lambda_c: float
    by_kind: Mapping[str, float]
    last_layer: Mapping[str, float]
    envelope: float
    mean: bool
    final: Mapping[str, bool]
    tokens: bool = False
    static_share: float | None = None
    seed: int = 0


def released_plan(model: PrunableModel, scores: Scores, costs: CostModel, released: Released) -> Plan:
    """Select as the release does; its figures and those of what runs are both in the plan's details.

    On the vision path the release counts pruned heads as gone and evaluates with all of them:
    the plan keeps them, and says so.

    Raises:
        InputError: If the model has other units than heads and neurons.
    """
    if kinds := {g.kind for g in model.unit_groups()} - {"head", "neuron"}:
        raise InputError(f"prune.mode=compat: the released search takes heads and neurons, not {', '.join(kinds)}s")
    accounting = Accounting.of(model, float(scores.facts["length"]))
    final, vision = _importances(model, scores, released), not scores.facts["language"]
    share = _share(released) if released.tokens else 1.0
    base = accounting.total()
    selected = searched(final, accounting, base * (1 - share * released.ratio), overshoot=vision)
    counts = {name: len(units) for name, units in selected.items()}
    details: dict[str, Any] = {"mode": "compat", "length": accounting.length, "base_macs": base}
    lengths = None
    tokens: dict[str, Any] = {}
    if released.tokens:
        to_remove = (1 - share) * released.ratio * base
        left, met = released_walk(by_layer(final, model), accounting, counts, to_remove)
        lengths = [n - 1 for n in left]
        reduction = Reduction(released_schedule(left))
        assert costs.tokens is not None
        tokens = {"tokens": reduction, "token_counts": tuple(costs.tokens.counts(reduction))}
        details |= {"static_share": share, "nominal_tokens": left, "tokens_exhausted": not met}
    nominal = accounting.total(counts, lengths)
    details |= {"nominal_macs": nominal, "heads_applied": not vision, "notes": _notes(vision, details)}
    kept = {name: units for name, units in selected.items() if not (vision and accounting.kinds[name] == "head")}
    if vision:
        details["heads_counted"] = {name: counts[name] for name in counts if accounting.kinds[name] == "head"}
    details["executed_ratio"] = 1 - _executed(model, costs, kept, tokens) / costs.total("macs")
    return Plan.of(
        model, kept, budget="macs", ratio_asked=released.ratio, ratio_reached=1 - nominal / base,
        details=details, **tokens,
    )  # fmt: skip


def _notes(vision: bool, details: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before the figures."""
    notes = ["prune.mode=compat: the ratio is of the encoder's MACs as the released code counts them."]
    if vision:
        notes.append("As released, heads are counted as removed, and all of them run (heads_applied: false).")
    if details.get("tokens_exhausted"):
        notes.append("Tokens ran out before their share of the MACs was gone; the released code would have failed.")
    return notes


def _importances(model: PrunableModel, scores: Scores, released: Released) -> Mapping[str, Tensor]:
    """Combined and modified scores; published ones are that already."""
    if PUBLISHED in scores.terms:
        return scores.terms[PUBLISHED]
    facts, groups = scores.facts, list(model.unit_groups())
    scored = [*groups, *(positions_of(model) if released.tokens else [])]
    grams = {"head": facts["rows"], "neuron": facts["rows"], TOKEN: facts["samples"]} if released.mean else None
    rule = Rule(
        released.loss, 1 / released.lambda_c if released.lambda_c else 1.0, not facts["language"],
        released.envelope, released.final, grams,
    )  # fmt: skip
    layers = len(model.blocks())
    found = combined(scores.terms, scored, layers, rule)
    if facts["language"]:
        found = {name: values * prior(groups)[name] for name, values in found.items()}
    return decayed(found, scored, layers, released.by_kind, released.last_layer)


def _share(released: Released) -> float:
    """The released split: drawn once from a global generator that was seeded before."""
    if released.static_share is not None:
        return released.static_share
    return float(np.random.RandomState(released.seed).uniform(*SHARES))


def _executed(model: PrunableModel, costs: CostModel, kept: Mapping[str, Tensor], tokens: Mapping[str, Any]) -> float:
    """MACs that run."""
    counts = costs.counts | {name: len(units) for name, units in kept.items()}
    if not tokens:
        return costs.total("macs", counts)
    assert costs.tokens is not None
    return cut_costs(costs.tokens, model, counts).of(tokens["tokens"])
