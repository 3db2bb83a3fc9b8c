"""The two losses of one masked unit, for many candidates at once: pure functions.

Shapes: C candidates, K sampled rows, d features.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def feature_rows(features: Tensor, candidates: int = 1, axis: int = 1) -> Tensor:
    """Bring a feature map of stacked candidates to rows: (C * B, ..., d) or (C * B, d, H, W) to (C, rows, d).

    Args:
        features: Output of a feature point, candidate-major along the batch.
        candidates: How many are stacked, C.
        axis: Where maps of four dimensions have their features, `PrunableModel.feature_axis`.
    """
    if features.ndim == 4:
        features = features.movedim(axis, -1)  # (C * B, H, W, d)
    return features.reshape(candidates, -1, features.shape[-1])  # (C, rows, d)


def sampled(features: Tensor, rows: Tensor | None, candidates: int = 1, axis: int = 1) -> Tensor:
    """Normalised feature rows, float32.

    Args:
        features: Output of a feature point, candidate-major along the batch.
        rows: Which rows of each candidate, (K,); None takes all.
        candidates: How many are stacked.
        axis: As for `feature_rows`.

    Returns:
        (C, K, d), each row of length 1.
    """
    found = feature_rows(features, candidates, axis)
    found = found if rows is None else found.index_select(1, rows)
    return normalize(found.float(), dim=-1)


def manifold_distance(masked: Tensor, dense: Tensor) -> Tensor:
    """`||X X^T - X' X'^T||_F^2` of each candidate, from the difference D = X' - X.

    The difference of the Grams is `D X'^T + X D^T`. With fewer features than half the rows its
    norm is taken from d x d products instead of K x K ones; both avoid subtracting two nearly
    equal Grams.

    Args:
        masked: Features with one unit masked, (C, K, d).
        dense: Features of the dense model, (K, d).

    Returns:
        (C,).
    """
    moved = masked - dense
    rows, width = dense.shape
    if 2 * width >= rows:
        change = moved @ masked.transpose(1, 2) + dense @ moved.transpose(1, 2)  # (C, K, K)
        return change.square().sum(dim=(1, 2))
    own = moved.transpose(1, 2) @ moved  # P = D^T D, (C, d, d)
    cross = moved.transpose(1, 2) @ dense  # C = D^T X, (C, d, d)
    gram = dense.T @ dense  # S = X^T X, (d, d)
    masked_gram = gram + cross + cross.transpose(1, 2) + own
    left, right, both = own * masked_gram, own * gram, cross.transpose(1, 2) * (cross + own)
    return left.sum(dim=(1, 2)) + right.sum(dim=(1, 2)) + 2 * both.sum(dim=(1, 2))


def token_gram(features: Tensor, candidates: int = 1, axis: int = 1) -> Tensor:
    """Mean over positions t of `X_t X_t^T`, X_t the samples' normalised features at t.

    Args:
        features: Output of a feature point, candidate-major along the batch, (C * B, ..., d).
        candidates: How many are stacked.
        axis: As for `feature_rows`.

    Returns:
        (C, B, B).
    """
    found = normalize(feature_rows(features, len(features), axis).float(), dim=-1)  # (C * B, T, d)
    positions = found.shape[1]
    flat = found.flatten(1).unflatten(0, (candidates, -1))  # (C, B, T * d)
    return flat @ flat.transpose(1, 2) / positions


def distilled(deviations: Tensor, temperature: float) -> Tensor:
    """`temp^2` times the sum of the samples' deviations (C, B), at least 0; returns (C,)."""
    return (temperature**2 * deviations.sum(dim=1)).clamp(min=0)


def draw_rows(count: int, most: int, valid: Tensor | None, seed: int) -> Tensor | None:
    """Which rows stand for a feature map, the same for the same seed.

    Args:
        count: Rows there are.
        most: Rows to keep, K.
        valid: Which rows are no padding, (count,); None means all.
        seed: Of the draw.

    Returns:
        (K,) int64 in ascending order, or None where all rows are kept.
    """
    pool = torch.arange(count) if valid is None else valid.flatten().nonzero().flatten().cpu()
    if len(pool) <= most:
        return None if len(pool) == count else pool
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:most]].sort().values
