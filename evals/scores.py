"""What answers are worth against labels: pure functions, over a whole split."""

import math

from torch import Tensor


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent samples."""
    return math.sqrt(share * (1 - share) / count)


def f1(answers: Tensor, labels: Tensor) -> float | None:
    """F1 of label 1, the positive one; 0 where nothing is found or nothing was to be found.

    Args:
        answers: (N,), integers.
        labels: (N,), integers.
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), answers.numpy(), pos_label=1, average="binary", zero_division=0))  # type: ignore[arg-type]


def matthews(answers: Tensor, labels: Tensor) -> float | None:
    """Matthews correlation of two label vectors (N,); 0 where one of them is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels.numpy(), answers.numpy()))


def pearson(answers: Tensor, labels: Tensor) -> float | None:
    """Pearson correlation of two vectors (N,); None where one of them is constant."""
    from scipy.stats import pearsonr

    return float(pearsonr(answers.numpy(), labels.numpy())[0]) if _vary(answers, labels) else None  # type: ignore[arg-type]


def spearman(answers: Tensor, labels: Tensor) -> float | None:
    """Rank correlation of two vectors (N,), ties at their mean rank; None where one is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(answers.numpy(), labels.numpy())[0]) if _vary(answers, labels) else None  # type: ignore[arg-type]


def _vary(*vectors: Tensor) -> bool:
    return all(len(vector) > 1 and bool((vector != vector[0]).any()) for vector in vectors)
