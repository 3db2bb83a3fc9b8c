"""Normal equations of a consumer: sums over calibration rows from which every repair is solved in closed form.

Shapes: N rows, k columns of the consumer and a column of ones behind them, D outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.optin.precision import computed_in, in_float32

# columns of a Gram matrix that are computed together
STRIPE = 128


@dataclass(frozen=True)
class Normal:
    """Sums over rows x (with a one behind) and residuals r, what is wanted less what is given.

    Attributes:
        gram: `sum of x x^T`, (k + 1, k + 1), float64.
        cross: `sum of x r^T`, (k + 1, D), float64.
        error: `sum of |r|^2` per output, (D,), float64.
        rows: N.
    """

    gram: Tensor
    cross: Tensor
    error: Tensor
    rows: int

    @classmethod
    def none(cls, columns: int, outputs: int, device: torch.device) -> "Normal":
        """Sums over no rows."""
        zeros = [torch.zeros(*shape, dtype=torch.float64, device=device)
                 for shape in ((columns + 1, columns + 1), (columns + 1, outputs), (outputs,))]  # fmt: skip
        return cls(*zeros, rows=0)

    def add(self, x: Tensor, r: Tensor) -> "Normal":
        """Take in more rows, in place; products in float32 (or what x is in, if wider), sums in float64.

        Args:
            x: (N, k).
            r: (N, D).
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x, r = x.to(wide), r.to(wide)
        with computed_in("float32", x.device), in_float32(x.device):
            self.gram[:-1, :-1] += gram(x)
            self.cross[:-1] += x.T @ r
        sums = x.sum(dim=0, dtype=torch.float64)
        self.gram[-1, :-1] += sums
        self.gram[:-1, -1] += sums
        self.gram[-1, -1] += len(r)
        self.cross[-1] += r.sum(dim=0, dtype=torch.float64)
        self.error.add_(r.square().sum(dim=0, dtype=torch.float64))
        return Normal(self.gram, self.cross, self.error, self.rows + len(r))

    def error_after(self, delta: Tensor) -> Tensor:
        """`sum of |r - delta^T x|^2` per output, (D,); delta is (k + 1, D)."""
        change = (delta * (self.gram @ delta - 2 * self.cross)).sum(dim=0)
        return (self.error + change).clamp(min=0)


def gram(x: Tensor) -> Tensor:
    """`x^T x` of rows (N, k), (k, k) in their type; what lies below the diagonal's stripes mirrors the rest."""
    columns = x.shape[1]
    found = x.new_empty(columns, columns)
    for start in range(0, columns, STRIPE):
        stop = start + STRIPE
        found[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        found[stop:, start:stop] = found[start:stop, stop:].T
    return found
