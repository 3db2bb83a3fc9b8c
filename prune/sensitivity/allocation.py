"""The file in which a sensitivity analysis leaves its curves, and what other methods take from it."""

import hashlib
import json
from collections.abc import Mapping
from math import floor, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.cost import CostModel
from prune.sensitivity.curves import Curve, best_shares, marginals
from prune.whole.threshold import asked_count
from utils.errors import InputError
from utils.files import write_atomically

FORMAT = 1

Curves = dict[str, Curve]


def write_allocation(
    path: Path, curves: Mapping[str, Curve], sizes: Mapping[str, int], facts: Mapping[str, Any]
) -> None:
    """Write curves as JSON.

    Args:
        path: The file.
        curves: Per part (unit group or linear) its curve.
        sizes: Units or weights of each.
        facts: What they were measured on.
    """
    parts = {
        name: {"count": sizes[name], "ratio": list(curve.ratios), "loss_change": list(curve.losses)}
        for name, curve in curves.items()
    }
    write_atomically(path, json.dumps({"format": FORMAT, **facts, "parts": parts}, indent=1).encode())


def read_allocation(path: str | Path) -> Curves:
    """Read curves; a part may also say only `removed`, the fraction that it should lose.

    A bare fraction s stands for the curve through which the optimum at that fraction is s: the
    loss `x^2 / (2 s)` a unit of size, so that all parts are scaled alike where a ratio asks for more or less.

    Raises:
        InputError: If the file can't be read, or a number in it can't be.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        curves = {name: _curve(part) for name, part in found["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"prune.allocation={path}: is no allocation file ({error!r}); see docs/design.md") from error
    for name, curve in curves.items():
        ordered = all(a < b for a, b in zip((0.0, *curve.ratios), curve.ratios, strict=False))
        if not ordered or curve.ratios[-1] > 1 or not all(map(isfinite, curve.losses)):
            raise InputError(f"prune.allocation={path}: {name}: ratios must ascend in (0, 1] and losses be finite")
    return curves


def content_of(allocation: str | None) -> str | None:
    """What a result depends on: the content of a file, and any other way by its name."""
    if allocation is None or not Path(allocation).is_file():
        return allocation
    return hashlib.sha256(Path(allocation).read_bytes()).hexdigest()


def _curve(part: Mapping[str, Any]) -> Curve:
    if "removed" in part:
        share, count = float(part["removed"]), int(part["count"])
        if not 0 <= share <= 1:
            raise ValueError(f"removed={share} must be in [0, 1]")
        grid = tuple(step / 100 for step in range(1, 101))
        return Curve(grid, tuple(count * x * x / (2 * max(share, 1e-6)) for x in grid))
    curve = Curve(tuple(map(float, part["ratio"])), tuple(map(float, part["loss_change"])))
    if not curve.ratios or len(curve.ratios) != len(curve.losses):
        raise ValueError("ratio and loss_change must be lists of the same length")
    return curve


def removed_counts(
    path: str | Path, sizes: Mapping[str, int], ratio: float, floors: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many weights each linear loses, so that the summed curves are lowest and the ratio is met exactly.

    Args:
        path: The file.
        sizes: Weights of each linear.
        ratio: Fraction of all of them to remove.
        floors: Weights that each keeps at least.

    Raises:
        InputError: If the file lacks a linear, or its curves do not reach the ratio.
    """
    curves = read_allocation(path)
    refuse_missing(path, curves, sizes)
    shares = best_shares({name: curves[name] for name in sizes}, sizes, ratio)
    if shares is None:
        reach = sum(size * curves[name].ratios[-1] for name, size in sizes.items()) / sum(sizes.values())
        raise InputError(f"prune.ratio={ratio}: the curves in prune.allocation={path} reach to {reach:.4g}; lower it")
    most = {name: size - (floors or {}).get(name, 0) for name, size in sizes.items()}
    exact = {name: share * sizes[name] for name, share in shares.items()}
    return _whole(exact, most, asked_count(ratio, sum(sizes.values())))


def _whole(exact: Mapping[str, float], most: Mapping[str, int], total: int) -> dict[str, int]:
    """Round counts so that they sum up to a total: down, and up again those that lost most by it."""
    counts = {name: min(most[name], floor(value + 1e-9)) for name, value in exact.items()}
    order = sorted(counts, key=lambda name: counts[name] - exact[name])
    while missing := total - sum(counts.values()):
        able = [name for name in order if 0 <= counts[name] + (1 if missing > 0 else -1) <= most[name]]
        if not able:
            raise InputError("prune.allocation: the floors of the linears leave too little; lower prune.ratio")
        # floors can leave much to move, so many at once
        each = max(1, abs(missing) // len(able))
        for name in able[: abs(missing)]:
            room = most[name] - counts[name] if missing > 0 else counts[name]
            counts[name] += min(each, room) * (1 if missing > 0 else -1)
    return counts


def refuse_missing(path: str | Path, curves: Curves, wanted: Mapping[str, int]) -> None:
    """Raise an InputError that names the first part that has no curve."""
    if missing := [name for name in wanted if name not in curves]:
        raise InputError(
            f"prune.allocation={path}: has no curve for {missing[0]} ({len(missing)} of {len(wanted)} are missing); "
            "it must come from the same model, swept over the same kinds"
        )


def curves_of_units(path: str | Path, costs: CostModel) -> Curves:
    """The curves of all unit groups of a model.

    Raises:
        InputError: If the file lacks one.
    """
    curves = read_allocation(path)
    refuse_missing(path, curves, {name: count for name, count in costs.counts.items() if count})
    return curves


def allotted(curves: Mapping[str, Curve], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores whose order inside a group is that of the given ones, and whose values are what its curve says.

    Ranking them by value per cost takes units in the order in which they raise the summed curves
    least, which is the optimum under any budget.

    Args:
        curves: Per group; one without a curve keeps its units at the highest price.
        scores: Per group (count,), higher means keep.

    Returns:
        Per group (count,), float64.
    """
    found = {}
    for name, values in scores.items():
        count = len(values)
        if count:
            order = values.argsort(stable=True, descending=True).flip(0)  # what the search takes first comes first
            prices = marginals(curves[name], count)
            # pieces of a hull are straight: a trace of the order keeps it through the search
            prices += torch.arange(count) * (1e-9 * max(float(prices.abs().max()), 1e-30))
            found[name] = torch.empty(count, dtype=torch.float64).index_copy(0, order, prices)
        else:
            found[name] = values.double()
    return found
