"""What report.md says of dropped tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from evals.base import Measurement
from models.keeping import Keeping
from prune.base import Plan

HALVES = {"mlp": "MLP", "attention": "attention"}


def kept_tokens(plan: Plan, macs: Measurement | None) -> str:
    """Tokens kept per block, on the validation split where that was measured, and what they cost.

    Args:
        plan: A plan that drops tokens.
        macs: The MACs of the pruned model, None where they were not measured.
    """
    assert isinstance(plan.tokens, Keeping)
    details = macs.details if macs else {}
    rows, where = details.get("kept_tokens"), "validation"
    if rows is None:
        rows, where = plan.details.get("kept", []), "calibration"
    parts = [_table(rows), _sentence(plan.tokens, where)]
    return "\n".join([*parts, *([_costs(details)] if "ideal" in details else [])])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| block | attention mean | p95 | max | MLP mean | p95 | max |"
    lines = [head, "|--:" * 7 + "|"]
    for row in rows:
        cells = [f"{row[half][what]:.4g}" for half in ("attention", "mlp") for what in ("mean", "p95", "max")]
        lines.append(f"| {row['layer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sentence(keeping: Keeping, where: str) -> str:
    blocks = ", ".join(map(str, keeping.layers))
    fused = "" if keeping.fuse == "none" else " They leave one fused token."
    return (
        f"\nTokens of the {where} samples; {keeping.rule.name} drops some before the {HALVES[keeping.before]} of "
        f"blocks {blocks}.{fused} Batching: {keeping.batching}."
    )


def _costs(details: Mapping[str, Any]) -> str:
    rows = (("ideal, no padding", "ideal"), ("as batched", "executed"), ("dense, no padding", "dense_unpadded"))
    lines = ["\n| MACs over the validation split | mean | p95 |", "|---|--:|--:|"]
    lines += [f"| {text} | {details[key]['mean']:,.0f} | {details[key]['p95']:,.0f} |" for text, key in rows]
    return "\n".join([*lines, f"\nPadding is {details['padding_waste']:.1%} of the tokens that were computed."])
