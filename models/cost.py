"""MACs and parameters of a model as an exact function of how many units each group keeps.

A weight that several groups slice (a bottleneck's middle convolution) costs the product of
its kept dimensions, so a cost is a sum of products, not a sum of constants a unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from models.base import Batch, Products, PrunableModel, UnitGroup
from models.latency_table import LatencyTable
from models.positions import positions_per_call
from models.token_cost import TokenCosts, token_costs_of, why_no_token_costs
from utils.errors import InputError

Quantity = Literal["macs", "params", "latency"]
Kept = Mapping[str, int]


@dataclass(frozen=True)
class Length:
    """Length of one dimension: what always stays plus what each kept unit adds."""

    fixed: int
    per_unit: tuple[tuple[str, int], ...] = ()

    def at(self, kept: Kept) -> int:
        """The length when `kept` units per group are left."""
        return self.fixed + sum(positions * kept[group] for group, positions in self.per_unit)


@dataclass(frozen=True)
class Term:
    """`coefficient * product of lengths`, once in MACs and once in parameters.

    Attributes:
        macs: Coefficient for MACs.
        params: Coefficient for parameters.
        lengths: The factors.
        layer: Position of the block that it goes with; None outside the blocks.
    """

    macs: int
    params: int
    lengths: tuple[Length, ...]
    layer: int | None = None


@dataclass(frozen=True)
class CostModel:
    """Exact integer costs per sample; pure, so a search may call it freely.

    Attributes:
        terms: One for each weight, and one for each group's token-by-token products.
        counts: Units per group in the model as it is.
        widths: Features per unit of each group.
        kinds: What a unit of each group is.
        tokens: The same MACs as a function of the tokens in each block; None where they can't be merged.
        why_no_tokens: Why they can't, in one line.
        dropping: The same for tokens that are dropped; None where they can't be.
        why_no_dropping: Why they can't, in one line.
        dense: Costs that ratios refer to, where that is not the model as it is: those of the model before
            earlier rounds of pruning.
        blocks: Number of blocks.
        why_blocks_stay: Why none of them can be removed, in one line; None if they can.
        latency: What was measured of the time that units take; None where nothing was.
    """

    terms: tuple[Term, ...]
    counts: dict[str, int]
    widths: dict[str, int]
    kinds: dict[str, str] = field(default_factory=dict)
    tokens: TokenCosts | None = None
    why_no_tokens: str | None = None
    blocks: int = 0
    why_blocks_stay: str | None = None
    dropping: TokenCosts | None = None
    why_no_dropping: str | None = None
    dense: "CostModel | None" = None

    @property
    def reference(self) -> "CostModel":
        """What ratios refer to."""
        return self.dense or self

    latency: LatencyTable | None = None

    def total(self, quantity: Quantity, kept: Kept | None = None, blocks: Sequence[int] | None = None) -> int:
        """MACs per sample or number of parameters with `kept` units per group and these `blocks` (default all).

        `latency` is in nanoseconds of one pass, for all blocks.
        """
        if quantity == "latency":
            return self._latency(self.counts if kept is None else kept)
        terms = self.terms if blocks is None else [t for t in self.terms if t.layer is None or t.layer in blocks]
        return _sum(terms, quantity, self.counts if kept is None else kept)

    def _latency(self, kept: Kept) -> int:
        if self.latency is None:
            raise InputError("prune.budget=latency: no latencies were measured for this model")
        return self.latency.at(kept)

    def touching(self, group: str) -> "CostModel":
        """The part of the cost that depends on one group."""
        terms = [t for t in self.terms if any(group == g for s in t.lengths for g, _ in s.per_unit)]
        return CostModel(tuple(terms), self.counts, self.widths, self.kinds)

    def touches_others(self, group: str) -> bool:
        """Whether any term depends on a group other than this one."""
        return any(group != g for t in self.terms for s in t.lengths for g, _ in s.per_unit)


def _sum(terms: Sequence[Term], quantity: Quantity, kept: Kept) -> int:
    return sum(getattr(term, quantity) * prod(length.at(kept) for length in term.lengths) for term in terms)


def cost_model(model: PrunableModel, example: Batch) -> CostModel:
    """Derive a model's costs from its weights, its unit groups and one forward pass.

    A linear or convolution costs its weight's size times the positions it runs at; the
    attention products of a group cost `pairwise_features * queries * keys` a unit.

    Args:
        model: The model to describe; left as it was.
        example: A batch of one sample, of the shape that costs are meant for.
    """
    calls = positions_per_call(model, example)
    groups = model.unit_groups()
    terms = _weight_terms(model, groups, calls)
    terms += [_attention_term(g, calls) for g in groups if g.pairwise_features and g.count]
    terms += [_whole_term(model, products, calls) for products in model.whole_products()]
    counts = {group.name: group.count for group in groups}
    widths, kinds = ({g.name: getattr(g, what) for g in groups} for what in ("width", "kind"))
    why_no_tokens = why_no_token_costs(model)
    tokens = None if why_no_tokens else token_costs_of(model, calls)
    blocks = len(model.blocks())
    why_no_dropping = why_no_token_costs(model, dropped=True)
    dropping = None
    if not why_no_dropping:
        of_example = {"protected": model.never_dropped(example), "ragged": "attention_mask" in example}
        dropping = replace(token_costs_of(model, calls), **of_example)
    return CostModel(
        tuple(terms), counts, widths, kinds, tokens, why_no_tokens, blocks, model.why_blocks_stay(),
        dropping, why_no_dropping,
    )  # fmt: skip


def _weight_terms(model: PrunableModel, groups: Sequence[UnitGroup], calls: Mapping[str, list[int]]) -> list[Term]:
    sliced: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in groups:
        for part in group.slices:
            entry = (group.name, part.index.shape[1])
            sliced.setdefault((part.tensor, part.dim), []).append(entry)
    counts = {group.name: group.count for group in groups}

    terms, counted, blocks = [], set(), model.blocks()
    for name, tensor in model.network.named_parameters(remove_duplicate=False):
        lengths = [_length(size, sliced.get((name, dim), []), counts) for dim, size in enumerate(tensor.shape)]
        module, _, leaf = name.rpartition(".")
        runs = sum(calls.get(module, [])) if leaf == "weight" else 0
        # a tied weight is multiplied wherever it is used, but held once
        layer = _layer_of(name, blocks)
        terms.append(Term(macs=runs, params=int(id(tensor) not in counted), lengths=tuple(lengths), layer=layer))
        counted.add(id(tensor))
    return terms


def _length(size: int, per_unit: Sequence[tuple[str, int]], counts: Kept) -> Length:
    in_groups = sum(positions * counts[group] for group, positions in per_unit)
    return Length(size - in_groups, tuple(per_unit))


def _whole_term(model: PrunableModel, products: Products, calls: Mapping[str, list[int]]) -> Term:
    queries, keys = calls[products.queries], calls[products.keys]
    pairs = sum(q * k for q, k in zip(queries, keys * len(queries) if len(keys) == 1 else keys, strict=True))
    return Term(products.features * pairs, 0, (), _layer_of(products.queries, model.blocks()))


def _layer_of(name: str, blocks: Sequence[str]) -> int | None:
    """Position of the block that holds a module or tensor; None outside of them."""
    return next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)


def _attention_term(group: UnitGroup, calls: Mapping[str, list[int]]) -> Term:
    queries = calls.get(group.consumer.module, [])
    keys = calls[group.keys_from] if group.keys_from else [group.keys_per_query or count for count in queries]
    pairs = sum(count * others for count, others in zip(queries, keys, strict=True))
    # weights that were counted for every key, and run for queries alone
    spared = group.query_weights * (sum(keys) - sum(queries))
    lengths = (Length(0, ((group.name, 1),)),)
    return Term(macs=group.pairwise_features * pairs - spared, params=0, lengths=lengths, layer=group.layer)
