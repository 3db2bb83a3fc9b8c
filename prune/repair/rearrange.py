"""Rearrangement of Kwon et al. (NeurIPS 2022, arXiv:2204.09656): other units of a group in place of those that go.

How many go stays the same. With g_u the gradients of unit u's gate over mini-batches, what the loss rises by when the
units P of a group go is estimated with all cross terms, `cost(P) = |sum over u in P of g_u|^2`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from prune.base import GroupPlan, Plan


def rearranged(gradients: Tensor, kept: Tensor) -> Tensor:
    """Swap units of one group where that lowers the cost of those that go.

    Units that stay are looked at once each, the least important first: each joins those that go, and the member whose
    return leaves the smallest cost stays in its place, which may be the one that has just joined.

    Args:
        gradients: (batches, count).
        kept: Ascending indices of the units that stay.

    Returns:
        Ascending indices of as many units, int64; the same where nothing goes or nothing stays.
    """
    count = gradients.shape[1]
    if not 0 < len(kept) < count:
        return kept
    g = gradients.double()
    importance = g.square().sum(dim=0)
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    members = gone.nonzero().flatten()
    columns, squares = g[:, members].T.contiguous(), importance[members]  # (P, batches), (P,)
    total = columns.sum(dim=0)
    for unit in sorted(kept.tolist(), key=lambda u: (float(importance[u]), u)):
        total = total + g[:, unit]
        # |total - g_w|^2 less |total|^2, for every member w and, last, the unit itself
        saved = squares - 2 * (columns @ total)
        best = int(saved.argmin())
        own = float(importance[unit] - 2 * (g[:, unit] @ total))
        if float(saved[best]) >= own:  # a tie changes nothing
            total = total - g[:, unit]
            continue
        total = total - columns[best]
        members[best], squares[best], columns[best] = unit, importance[unit], g[:, unit]
    gone = torch.zeros(count, dtype=torch.bool)
    gone[members] = True
    return (~gone).nonzero().flatten()


def group_cost(gradients: Tensor, kept: Tensor) -> float:
    """`|sum of g_u|^2` over the units that do not stay."""
    gone = torch.ones(gradients.shape[1], dtype=torch.bool)
    gone[kept] = False
    return float(gradients.double()[:, gone].sum(dim=1).square().sum())


def rearranged_plan(plan: Plan, gradients: dict[str, Tensor]) -> Plan:
    """A plan with every group rearranged by itself; its details say what that did to the summed cost."""
    groups: list[GroupPlan] = []
    before = after = 0.0
    swapped = 0
    for group in plan.groups:
        old = torch.tensor(group.kept, dtype=torch.int64)
        new = rearranged(gradients[group.name], old)
        before += group_cost(gradients[group.name], old)
        after += group_cost(gradients[group.name], new)
        swapped += len(set(group.kept) - set(new.tolist()))
        groups.append(replace(group, kept=tuple(new.tolist())))
    facts = {"swapped": swapped, "cost_before": before, "cost_after": after}
    return replace(plan, groups=tuple(groups), details={**plan.details, "rearranged": facts})
