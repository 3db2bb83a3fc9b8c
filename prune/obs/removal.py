"""Which units a matrix product misses least when what is left is refitted, and what each of them costs.

Optimal brain surgeon (Hassibi and Stork, 1992) over groups of columns, with a Kronecker-factored curvature as in the
LLM Surgeon (van der Ouderaa et al., ICLR 2024, arXiv:2312.17244), sections 3.1 to 3.3. Removing the columns S of W and
refitting the others costs `tr(G W_S (H^-1_SS)^-1 W_S^T)`, to second order, for inputs of second moment H and output
gradients of second moment G.
"""

import torch
from torch import Tensor

# more units than these go several at a time
MOST_STEPS = 1024
# what keeps inputs that depend on each other invertible
LEAST_DAMPING = 1e-9


def removal_costs(inputs: Tensor, outputs: Tensor, matrix: Tensor, columns: Tensor, damping: float) -> Tensor:
    """What each unit costs at its turn, when units go one after the other, the cheapest first.

    Later units cost no less than earlier ones, so that a threshold on costs is a point in that order. A column of ones
    (the bias) is always there to refit.

    Args:
        inputs: H, mean of `x x^T` with a one behind x, (k + 1, k + 1), float64.
        outputs: G, mean of `g g^T`, (D, D), float64.
        matrix: W^T, (k, D), float64.
        columns: Which columns belong to each unit, (count, width).
        damping: Added to the diagonal of H, as a part of its mean.

    Returns:
        (count,), float32, on the CPU.
    """
    count, width = columns.shape
    exact = torch.float64 if width > 1 else torch.float32  # single columns are many, and float32 orders them as well
    inverse = _inverse(inputs, damping).to(exact)
    seen = (_root(outputs) @ matrix.T).to(exact)  # (D, k): |seen|^2 is what G makes of W
    columns = columns.to(inverse.device)
    costs = torch.zeros(count, dtype=torch.float64, device=inverse.device)
    alive = torch.ones(count, dtype=torch.bool, device=inverse.device)
    at_once, highest = -(-count // MOST_STEPS), 0.0
    while left := int(alive.sum()):
        found = _costs(inverse, seen, columns).double().masked_fill(~alive, torch.inf)
        least, units = found.topk(min(at_once, left), largest=False, sorted=True)
        highest = max(highest, float(least[-1]))
        costs[units] = highest
        alive[units] = False
        _remove(inverse, seen, columns[units].flatten())
    return costs.float().cpu()


def _inverse(inputs: Tensor, damping: float) -> Tensor:
    """Inverse of H without the row and column of the bias, which is never removed, (k, k)."""
    columns = len(inputs) - 1
    pull = torch.zeros(columns + 1, dtype=inputs.dtype, device=inputs.device)
    if columns:
        mean = inputs.diagonal()[:columns].mean()
        # dead inputs everywhere: any pull does, their units cost nothing
        pull[:columns] = max(damping, LEAST_DAMPING) * torch.where(mean > 0, mean, 1.0)
    pull[-1] = LEAST_DAMPING
    return torch.linalg.inv(inputs + pull.diag())[:columns, :columns]


def _root(matrix: Tensor) -> Tensor:
    """R with `R^T R` the symmetric matrix given."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _costs(inverse: Tensor, seen: Tensor, columns: Tensor) -> Tensor:
    """`tr(A_u (H^-1_uu)^-1 A_u^T)` of every unit, (count,)."""
    if columns.shape[1] == 1:
        single = columns[:, 0]
        return seen[:, single].square().sum(dim=0) / inverse.diagonal()[single].clamp(min=1e-30)
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (count, width, width)
    parts = seen.T[columns]  # (k, D) -> (count, width, D)
    return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))


def _remove(inverse: Tensor, seen: Tensor, gone: Tensor) -> None:
    """Refit what is left without some columns, in place; they themselves become the identity and zero."""
    pushed = torch.linalg.solve(inverse[gone[:, None], gone], inverse[gone])  # (width, k)
    seen -= seen[:, gone] @ pushed
    inverse -= inverse[:, gone] @ pushed
    seen[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = 1
