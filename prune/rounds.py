"""Pruning in rounds: rank, cut and recover again and again until the ratio is reached; one round is the plain run.

Every round's ranking and recovery lies in storage under what it depends on, so that an
interrupted run goes on where it was, and ends with the same weights.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel, cost_model
from prune.base import Method, Plan
from prune.ranking import Ranking, ranked
from prune.recovery.base import Recovered, Recovery
from prune.rewriting import Applied, applied
from utils.storage import Store

Schedule = Literal["linear", "cubic"]


class Watcher(Protocol):
    """Who is told how far a run is; the record of a run is one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the run."""
        ...

    def note(self, model: PrunableModel, data: DataBundle, ranking: Ranking) -> None:
        """Take in the first ranking, that of the dense model."""
        ...

    def note_applied(self, done: Applied) -> None:
        """Take in a plan as it was carried out."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What pruning and recovery left.

    Attributes:
        ranking: That of the dense model.
        plan: All rounds together, against the dense model.
        cut: The model after the last cut.
        recovered: The model after the last recovery, with the history of all.
    """

    ranking: Ranking
    plan: Plan
    cut: PrunableModel
    recovered: Recovered


def ratios(ratio: float, steps: int, schedule: Schedule) -> list[float]:
    """The ratio to reach in each round, the last of them exactly the one asked for.

    Args:
        ratio: Of the whole run.
        steps: Rounds.
        schedule: `linear` removes the same part of the dense model in each round; `cubic` follows
            `ratio * (1 - (1 - k / steps)^3)` (Zhu and Gupta, 2017, arXiv:1710.01878), much at first.
    """
    parts = [k / steps if schedule == "linear" else 1 - (1 - k / steps) ** 3 for k in range(1, steps)]
    return [*(round(ratio * part, 9) for part in parts), ratio]


def rounds_of(method: Method) -> list[Method]:
    """The method once a round, each with the ratio to reach; a method without rounds is one by itself."""
    steps = getattr(method, "steps", 1)
    if not isinstance(steps, int) or steps == 1:
        return [method]
    schedule: Schedule = getattr(method, "schedule", "linear")
    return [replace(method, ratio=ratio, steps=1) for ratio in ratios(method.ratio, steps, schedule)]  # type: ignore[attr-defined,type-var]


def in_rounds(
    method: Method, recovery: Recovery, model: PrunableModel, data: DataBundle, store: Store, costs: CostModel,
    seed: int, watcher: Watcher, keep: Callable[[Plan], None] = lambda plan: None,
    priced: Callable[..., CostModel] = lambda costs, model: costs,
) -> Outcome:  # fmt: skip
    """Rank, cut and recover a model, in as many rounds as the method has.

    Args:
        method: What chooses; ratios are of the dense model in every round.
        recovery: What trains after each cut.
        model: The dense model; left as it was.
        data: Calibration, train and validation batches.
        store: Where rankings and recovered weights are kept.
        costs: Of the dense model.
        seed: Of the recovery.
        watcher: Is told how far it is.
        keep: Is given every plan as soon as it stands.
        priced: Adds to the costs of a model, both of them given, what a budget needs beyond MACs and parameters.
    """
    from prune.sensitivity.files import with_allocation

    current, first, total, done = model, Ranking(), None, list[Recovered]()
    cut, rows = model, list[dict[str, Any]]()
    for number, part in enumerate(rounds_of(method), start=1):
        with watcher.phase("rank"):
            part = with_allocation(part, current, data, store)
            ranking = ranked(part, current, data, store)
            if number == 1:
                first = ranking
                watcher.note(current, data, ranking)
        with watcher.phase("search"):
            here = costs
            if number > 1:
                here = replace(priced(costs=cost_model(current, data.example), model=current), dense=costs)
            plan = part.plan(current, ranking.scores, here)
            keep(plan if total is None else joined(total, plan))
        with watcher.phase("cut"):
            carried = applied(part, current, plan, data, store)
            total = carried.plan if total is None else joined(total, carried.plan)
            cut = carried.model
            keep(total)
        with watcher.phase("recover"):
            done.append(recovery.recover(cut, model, data, store, seed))
            current = done[-1].model
        rows.append({"round": number, "ratio_asked": plan.ratio_asked, "ratio_reached": carried.plan.ratio_reached})
    assert total is not None
    if len(rows) > 1:
        total = replace(total, details={**total.details, "rounds": rows})
    watcher.note_applied(replace(carried, plan=total))
    keep(total)
    return Outcome(first, total, cut, joined_histories(done))


def joined(before: Plan, after: Plan) -> Plan:
    """Two plans, the second made for what the first has left, as one for the model before the first."""
    kept = {group.name: group.kept for group in before.groups}
    groups = tuple(
        replace(old, kept=tuple(kept[old.name][unit] for unit in new.kept))
        for old, new in zip(before.groups, after.groups, strict=True)
    )
    return replace(after, groups=groups)


def joined_histories(done: list[Recovered]) -> Recovered:
    """Several recoveries one after the other as one: epochs count on, and each starts with a row for its cut."""
    if len(done) == 1 or not done[-1].history:
        return done[-1]
    history, start = [], 0
    for part in done:
        history += [{**row, "epoch": start + row["epoch"]} for row in part.history]
        start += int(part.facts["epochs"])
    summed = {name: sum(part.facts[name] for part in done) for name in ("epochs", "steps", "samples_seen", "seconds")}
    used = start - done[-1].facts["epochs"]
    last = {name: used + done[-1].facts[name] for name in ("best_epoch", "used_epoch")}
    seconds = [second for part in done for second in part.facts.get("epoch_seconds", [])]
    stopped = next((part.facts["stopped"] for part in done if part.facts.get("stopped")), None)
    facts = {**done[-1].facts, **summed, **last, "epoch_seconds": seconds, "stopped": stopped, "rounds": len(done)}
    return Recovered(done[-1].model, history, facts)
