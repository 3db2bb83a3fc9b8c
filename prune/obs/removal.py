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
    left = _Left(_inverse(inputs, damping).to(exact), (_root(outputs) @ matrix.T).to(exact), columns)
    costs = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    alive = torch.ones(count, dtype=torch.bool, device=inputs.device)
    at_once, highest = -(-count // MOST_STEPS), 0.0
    for start in range(0, count, at_once):
        found = left.costs().double().masked_fill(~alive, torch.inf)
        least, units = found.topk(min(at_once, count - start), largest=False, sorted=True)
        highest = max(highest, float(least[-1]))
        costs[units] = highest
        alive[units] = False
        left.remove(units)
    return costs.float().cpu()


class _Left:
    """What removal leaves of a matrix product.

    The inverse of what is left is the first one less a product for each removal: `R^T P` with `P = R_S^-1 R`, R the
    rows of the columns S that go. Of it only the units' own blocks are kept up. Rows are made when their columns go,
    in a sixth of the time that it takes to subtract every product from all of it.

    Args:
        inverse: Of H, (k, k).
        seen: W as G sees it, `|seen|^2` is its cost, (D, k).
        columns: Of each unit, (count, width).
    """

    def __init__(self, inverse: Tensor, seen: Tensor, columns: Tensor) -> None:
        self.inverse, self.seen, self.columns = inverse, seen, columns.to(inverse.device)
        self.blocks = inverse[self.columns[:, :, None], self.columns[:, None, :]]  # (count, width, width)
        self.rows, self.pushed = torch.empty_like(inverse), torch.empty_like(inverse)
        self.gone = 0

    def costs(self) -> Tensor:
        """`tr(A_u (H^-1_uu)^-1 A_u^T)` of every unit, (count,)."""
        if self.columns.shape[1] == 1:
            squares = self.seen.square().sum(dim=0)[self.columns[:, 0]]
            return squares / self.blocks[:, 0, 0].clamp(min=1e-30)
        parts = self.seen.T[self.columns]  # (k, D) -> (count, width, D)
        return (parts * torch.linalg.solve(self.blocks, parts)).sum(dim=(1, 2))

    def remove(self, units: Tensor) -> None:
        """Refit what is left without some units; they themselves become the identity and zero."""
        gone, before = self.columns[units].flatten(), slice(self.gone)
        rows = self.inverse[gone] - self.rows[before, gone].T @ self.pushed[before]  # (width, k)
        among = rows[:, gone]
        # their own blocks as costs know them, whatever rounding says
        shape = (len(units), self.columns.shape[1])
        among.view(*shape, *shape).diagonal(dim1=0, dim2=2).copy_(self.blocks[units].permute(1, 2, 0))
        pushed = torch.linalg.solve(among, rows)
        self.seen -= self.seen[:, gone] @ pushed
        self.seen[:, gone] = 0
        now = slice(self.gone, self.gone + len(gone))
        self.rows[now], self.pushed[now], self.gone = rows, pushed, now.stop
        mine, theirs = (part.T[self.columns] for part in (rows, pushed))  # (count, width, gone)
        self.blocks -= mine @ theirs.mT
        self.blocks[units] = torch.eye(self.columns.shape[1], dtype=rows.dtype, device=rows.device)


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
