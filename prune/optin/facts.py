"""What a search has to know of the data that scores were made from, kept with them as plain values."""

from typing import Any

import torch

from data.base import DataBundle
from models.base import Batch, PrunableModel
from prune.gates import calibration_of
from prune.optin.compat import LENGTHS
from utils.hooks import captured


def has_pads(data: DataBundle) -> bool:
    """Whether any calibration batch holds padding."""
    masks = (batch.get("attention_mask") for batch in data.calibration)
    return any(mask is not None and not bool(mask.all()) for mask in masks)


def facts_of(model: PrunableModel, data: DataBundle, rows: int) -> dict[str, Any]:
    """The facts of a ranking.

    Returns:
        `language` (whether the released language path would be taken), `length` (tokens that the
        release counts MACs with: the published mean of a GLUE task, else that of the
        calibration data; patches of an image), `tokens` (positions that can be scored, or
        None), `samples` and `rows` (sizes of the Grams of tokens and of units).
    """
    batch = calibration_of(data).calibration[0]
    samples = len(next(iter(batch.values())))
    positions = _positions(model, batch)
    language = data.domain == "language"
    length = _language_length(data) if language else positions - model.protected_tokens
    return {
        "language": language,
        "length": length,
        "tokens": None if model.why_not_mergeable() else positions,
        "samples": samples,
        "rows": min(rows, samples * positions),
    }


def _positions(model: PrunableModel, batch: Batch) -> int:
    """Tokens, or places of a feature map, that the first block gives for one sample."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    block = model.blocks()[0]
    with torch.inference_mode(), captured(model.network, [block]) as found:
        model.logits(model.place(one))
    given = found[block][0] if isinstance(found[block], tuple) else found[block]
    return given[0].numel() // given.shape[model.feature_axis if given.ndim == 4 else -1]


def _language_length(data: DataBundle) -> float:
    if (published := LENGTHS.get(data.name.removeprefix("glue-"))) is not None:
        return published
    masks = [batch["attention_mask"] for batch in data.calibration if "attention_mask" in batch]
    if not masks:
        return float(next(iter(data.example.values())).shape[1])
    return float(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))
