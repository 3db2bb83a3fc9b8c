"""Latency as a budget: blocks are timed with fewer and fewer units, a search goes by that table, a clock corrects it.

The table adds up what each group of units takes by itself. Real models take a little more or less, so the plan
that the table suggests is cut and timed, and the aim is moved by what was missed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import evals.timing
import models.latency_table
from data.base import DataBundle
from evals.base import Subject
from evals.harness import batches_of
from evals.timing import Protocol, steps_of, time_interleaved
from evals.timing_statistics import interval_of
from models.base import PrunableModel
from models.cost import CostModel
from models.latency_table import LatencyTable, Points
from prune.base import Plan
from prune.latency_aim import between, next_aim
from prune.surgery import cut
from utils.code import code_hash
from utils.distributed import from_first
from utils.environment import describe_device
from utils.errors import InputError
from utils.hooks import replaying
from utils.machine import describe_machine
from utils.progress import progress_bar
from utils.storage import Artifact, Scratch, Store, folder_name

LEVELS = 8
LARGEST = 256
OF_BLOCKS = Protocol(warmup=6, blocks=5, seconds=0.3, least_calls=20)
OF_MODELS = Protocol(warmup=6, blocks=7, seconds=1.5, least_calls=14, precision=0.01, longest=6.0)
TRIES, CLOSE, WITHIN = 8, 0.015, 0.05

Kept = dict[str, Tensor]
Select = Callable[[float], Kept]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Clock:
    """Times models against each other on the samples that a table was made with, by their quickest tenth of calls."""

    data: DataBundle
    batch: int
    protocol: Protocol = OF_MODELS

    def share(self, dense: PrunableModel, pruned: PrunableModel) -> tuple[float, tuple[float, float] | None, float]:
        """Time of the pruned model over the dense one's, its 95% interval, and the dense one's milliseconds.

        Of a run in several processes the first one measures, and all get its figures.
        """
        _, (share, interval, dense_ms) = from_first(lambda: ({}, self._measured(dense, pruned)))
        return share, interval and tuple(interval), dense_ms

    def _measured(self, dense: PrunableModel, pruned: PrunableModel) -> tuple[Any, ...]:
        calls = [_call(model, Subject(model, self.data).batch_of(self.batch)) for model in (dense, pruned)]
        with progress_bar("time of a plan", steps_of(self.protocol, len(calls)), still=True) as advance:
            ours, theirs = time_interleaved(calls, dense.device, self.protocol, advance)
        shares = [_quick_ms(b) / _quick_ms(a) for a, b in zip(ours.blocks_ms, theirs.blocks_ms, strict=True)]
        return statistics.median(shares), interval_of(shares), _quick_ms([ours.all_ms])


def _quick_ms(slots: Sequence[Sequence[float]]) -> float:
    """The quickest tenth of the calls of each slot, added up: what other work on the machine leaves alone."""
    return sum(float(np.percentile(slot, 10)) for slot in slots)


def _call(model: PrunableModel, placed: Any) -> Callable[[], object]:
    return lambda: model.logits(placed)


def with_latency(
    method: Any, costs: CostModel, model: PrunableModel, data: DataBundle, store: Store, dtype: torch.dtype
) -> CostModel:
    """Add a table of latencies to a model's costs, if the method's budget is latency.

    The table is measured once for a device, its threads, the type of numbers, and the model's shapes; weights
    make no difference to it.

    Raises:
        InputError: If the model has no unit groups inside blocks to time.
    """
    if getattr(method, "budget", None) != "latency":
        return costs
    twin = model.copy()
    twin.network.to(dtype)
    folder = f"{data.domain}/{folder_name(data.name)}/{folder_name(model.name)}"

    def compute(scratch: Scratch) -> Artifact:
        return Artifact({}, {"table": measured_table(twin, data).to_json()})

    found = store.fetch(folder, "latency", _key(twin, data), compute, by_first=True)
    facts = found.artifact.facts["table"]
    return replace(costs, latency=LatencyTable.from_json(facts, Clock(data, facts["batch"])))


def _key(model: PrunableModel, data: DataBundle) -> dict[str, Any]:
    machine = describe_machine(model.device)
    modes = ("threads", "float32_matmul_precision", "sdpa_backends", "tf32_matmul", "tf32_cudnn", "cudnn", "cuda")
    gpu = machine.get("gpu") or {}
    return {
        "device": describe_device(model.device) | {name: machine.get(name) for name in modes},
        "driver": gpu.get("driver"),
        "torch": torch.__version__,
        "dtype": str(model.dtype),
        "builder": model.recipe.builder,
        "arguments": dict(model.recipe.arguments),
        "units": [[g.name, g.kind, g.count, g.width] for g in model.unit_groups()],
        "tokens": model.reduction.to_json() if model.reduction else None,
        "example": {name: [str(tensor.dtype), *tensor.shape[1:]] for name, tensor in data.example.items()},
        "code": code_hash(type(model), Clock, evals.timing, models.latency_table),
        "levels": LEVELS,
    }


def measured_table(model: PrunableModel, data: DataBundle, protocol: Protocol = OF_BLOCKS) -> LatencyTable:
    """Time blocks with fewer and fewer units of each group, blocks of one shape once.

    Args:
        model: The dense model.
        data: Source of the samples.
        protocol: How long and in which order the variants of one block are timed.
    """
    subject = Subject(model, data)
    batch = batches_of("auto", [subject], LARGEST, compiled=False).common
    placed = subject.batch_of(batch)
    inputs = recorded_inputs(model, placed)
    layers = _by_layer(model, inputs)
    alike: dict[Any, list[int]] = {}
    for layer in layers:
        alike.setdefault(_shape_of(model, layer, layers[layer], inputs), []).append(layer)
    groups: dict[str, Points] = {}
    wholes = []
    with torch.inference_mode(), progress_bar("latency table", len(alike), still=True) as advance:
        for same in alike.values():
            whole, columns = _columns(model, placed, same[0], layers[same[0]], inputs[same[0]], protocol)
            for layer in same:
                groups |= dict(zip(layers[layer], columns, strict=True))
            wholes.append(whole)
            advance(f"block {same[0]}")
    units = sum(points[-1][1] for points in groups.values())
    return LatencyTable(max(0, round(statistics.median(wholes)) - units), groups, batch)


def recorded_inputs(model: PrunableModel, placed: Any) -> dict[int, Arguments]:
    """What each block is called with in one forward pass, by its position."""
    found: dict[int, Arguments] = {}

    def recorder(position: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            found[position] = (args, kwargs)
            return forward(*args, **kwargs)

        return record

    names = model.blocks()
    modules = [model.network.get_submodule(name) for name in names]
    answers = {n: recorder(i, m.forward) for i, (n, m) in enumerate(zip(names, modules, strict=True))}
    with torch.inference_mode(), replaying(model.network, answers):
        model.logits(placed)
    return found


def _by_layer(model: PrunableModel, inputs: Mapping[int, Arguments]) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    names = model.blocks()
    for group in model.unit_groups():
        if group.layer not in inputs or not group.consumer.module.startswith(f"{names[group.layer]}."):
            raise InputError(f"prune.budget=latency: {group.name} lies in no block of {model.name} that could be timed")
        layers.setdefault(group.layer, []).append(group.name)
    return layers


def _shape_of(model: PrunableModel, layer: int, names: Sequence[str], inputs: Mapping[int, Arguments]) -> Any:
    """What blocks must have in common to take equally long."""
    block = model.network.get_submodule(model.blocks()[layer])
    counts = {g.name: (g.kind, g.count, g.width) for g in model.unit_groups()}
    args, kwargs = inputs[layer]
    tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
    # buffers, too: of two blocks of one size, only the one with shifted windows has a mask
    weights = tuple(tuple(t.shape) for t in (*block.parameters(), *block.buffers()))
    extras = tuple(sorted(key for key, value in kwargs.items() if value is not None))
    return tuple(counts[n] for n in names), weights, tuple(tuple(t.shape) for t in tensors), extras, type(block)


def _columns(
    model: PrunableModel, placed: Any, layer: int, names: Sequence[str], inputs: Arguments, protocol: Protocol
) -> tuple[float, list[Points]]:
    """Nanoseconds of the whole model, and per group of one block those that its units add, at each level.

    The model is timed among the block's variants, so that a machine that slows down slows all of them. The quickest
    tenth of the calls is what counts: other work on the machine disturbs long calls more often than short ones.
    """
    counts = {g.name: g.count for g in model.unit_groups()}
    levels = {name: _levels(counts[name]) for name in names}
    variants = [model.network.get_submodule(model.blocks()[layer])]
    variants += [_block_with(model, layer, name, kept) for name in names for kept in levels[name][:-1]]
    calls = [_call(model, placed), *(_block_call(block, inputs) for block in variants)]
    times = time_interleaved(calls, model.device, protocol)
    whole, dense, *others = (1e6 * _quick_ms([t.all_ms]) for t in times)
    columns, rest = [], iter(others)
    for name in names:
        found = [*(next(rest) for _ in levels[name][:-1]), dense]
        columns.append(rising(levels[name], found))
    return whole, columns


def _levels(count: int) -> list[int]:
    """Numbers of units to time a block with, from none to all."""
    return sorted({round(count * step / LEVELS) for step in range(LEVELS + 1)})


def rising(levels: Sequence[int], times_ns: Sequence[float]) -> Points:
    """Times above that with no units, made to rise with the number of units by the nearest such line (isotonic)."""
    from sklearn.isotonic import isotonic_regression

    smooth = isotonic_regression(np.asarray(times_ns, dtype=float))
    return tuple((kept, round(float(ns - smooth[0]))) for kept, ns in zip(levels, smooth, strict=True))


def _block_with(model: PrunableModel, layer: int, name: str, kept: int) -> nn.Module:
    """A block as it is when one group keeps its first units."""
    return cut(model, Plan.of(model, {name: torch.arange(kept)})).network.get_submodule(model.blocks()[layer])


def _block_call(block: nn.Module, inputs: Arguments) -> Callable[[], object]:
    args, kwargs = inputs
    return lambda: block(*args, **kwargs)


def plan_by_latency(model: PrunableModel, costs: CostModel, ratio: float, select: Select) -> Plan:
    """The plan whose measured latency comes nearest to what was asked.

    Args:
        model: The dense model.
        costs: With a table of latencies and its clock.
        ratio: Fraction of the time to remove.
        select: Kept units per group for a fraction to remove by the table.
    """
    table = _table_of(costs)
    whole, wanted = table.at(costs.counts), 1 - ratio
    aim, tried = wanted, []
    for _ in range(TRIES):
        kept = select(_ratio(aim))
        counts = {name: len(units) for name, units in kept.items()}
        if any(counts == before["counts"] for before in tried):
            aim = between(tried, wanted, 0.5)
            kept = select(_ratio(aim))
            counts = {name: len(units) for name, units in kept.items()}
            if any(counts == before["counts"] for before in tried):
                break
        share, interval, dense_ms = table.clock.share(model, cut(model, Plan.of(model, kept)))
        tried.append(
            {"counts": counts, "kept": kept, "share": share, "interval": interval, "dense_ms": dense_ms, "aim": aim}
        )
        if abs(share / wanted - 1) <= CLOSE:
            break
        aim = next_aim(tried, wanted, _least_share(select, table, whole))
    best = min(tried, key=lambda found: abs(found["share"] / wanted - 1))
    return Plan.of(
        model, best["kept"], budget="latency", ratio_asked=ratio, ratio_reached=1 - best["share"],
        details={"latency": _said(best, tried, wanted, table, whole), **_notes(best, wanted)},
    )  # fmt: skip


def _least_share(select: Select, table: LatencyTable, whole: int) -> float:
    """The smallest share that the floors leave, by bisection on what the search accepts."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        try:
            select(_ratio(middle))
            high = middle
        except InputError:
            low = middle
    return high


def _ratio(share: float) -> float:
    """What goes where a share stays; rounded, so that 1 - 0.7 is 0.3 and a budget is met exactly."""
    return round(1 - share, 9)


def _table_of(costs: CostModel) -> LatencyTable:
    if costs.latency is None or costs.latency.clock is None:
        raise InputError(
            "prune.budget=latency: no latencies were measured for this model; see prune.latency.with_latency"
        )
    return costs.latency


def _said(
    best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]], wanted: float, table: LatencyTable, whole: int
) -> dict[str, Any]:
    """What a record keeps of the search."""
    dense = best["dense_ms"]
    return {
        "batch": table.batch,
        "dense_ms": dense,
        "asked_ms": wanted * dense,
        "table_ms": dense * table.at(best["counts"]) / whole,
        "reached_ms": best["share"] * dense,
        "reached_share": best["share"],
        "reached_share_interval": best["interval"],
        "miss": best["share"] / wanted - 1,
        "tries": [{"aim": t["aim"], "share": t["share"], "interval": t["interval"]} for t in tried],
    }


def _notes(best: Mapping[str, Any], wanted: float) -> dict[str, list[str]]:
    miss = best["share"] / wanted - 1
    if abs(miss) <= WITHIN:
        return {}
    bounds = best["interval"]
    doubt = f" (95% interval {bounds[0]:.1%} to {bounds[1]:.1%})" if bounds else ""
    return {
        "notes": [
            f"The latency reached is {best['share']:.1%} of the dense one{doubt}, {abs(miss):.1%} "
            f"{'above' if miss > 0 else 'below'} the {wanted:.1%} asked: no plan tried came within {WITHIN:.0%}."
        ]
    }
