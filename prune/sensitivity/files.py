"""Making an allocation on the way: a sensitivity analysis for whatever method asks for one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.base import DataBundle
from models.base import PrunableModel
from prune.base import Method
from prune.ranking import Ranking, ranked
from prune.sensitivity.allocation import write_allocation
from prune.sensitivity.checks import Row, curves_of
from prune.sensitivity.method import Sensitivity
from prune.structural import Structural
from utils.storage import Store

M = TypeVar("M", bound=Method)
ASKED = "sensitivity"


def with_allocation(method: M, model: PrunableModel, data: DataBundle, store: Store) -> M:
    """The method with a file in the place of `allocation=sensitivity`; any other as it is.

    The analysis sweeps what the method removes, units or weights, and is kept like a ranking.
    """
    if getattr(method, "allocation", None) != ASKED:
        return method
    what: Literal["units", "weights"] = "units" if isinstance(method, Structural) else "weights"
    score = _score_of(method, what)
    ranking = ranked(Sensitivity(sweep=(what,), score=score, ablate=False), model, data, store)
    return replace(method, allocation=str(allocation_of(ranking, model)))  # type: ignore[type-var]


def allocation_of(ranking: Ranking, model: PrunableModel) -> Path:
    """Write the allocation of a sensitivity analysis beside its scores."""
    assert ranking.path is not None
    path = ranking.path.with_suffix(".allocation.json")
    facts = ranking.scores.facts
    write_rows(
        path, facts["rows"], {"model": model.fingerprint(), "score": facts["score"], "samples": facts["samples"]}
    )
    return path


def write_rows(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write the curves of measured rows as an allocation."""
    write_allocation(path, curves_of(rows), {row["part"]: row["count"] for row in rows}, facts)


def _score_of(method: Method, what: str) -> Any:
    """Which units or weights of a layer go first: what the method itself looks at, where a sweep has it."""
    own = getattr(method, "score", None) or method.name
    known = {"fisher": "fisher", "taylor": "taylor", "taylor_batch": "taylor", "taylor_signed": "taylor_signed",
             "taylor_abs": "taylor_abs", "magnitude": "magnitude", "random": "random"}  # fmt: skip
    return known.get(own, "fisher" if what == "units" else "magnitude")
