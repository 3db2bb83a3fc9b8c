"""Names of a Mask2Former's weights: those of published checkpoints, and those of the network in memory.

Transformers renamed the parts of its Swin since the checkpoints were made, and translates as it loads and saves.
Here the cross-attention's three projections are linears of their own besides; published, they are one tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.mask2former_decoder import PROJECTIONS

BACKBONE = "model.pixel_level_module.encoder."
CROSS = ".cross_attn."
# in memory, published; of two that end alike the longer first
BACKBONE_NAMES = (
    (".attention.q_proj.", ".attention.self.query."),
    (".attention.k_proj.", ".attention.self.key."),
    (".attention.v_proj.", ".attention.self.value."),
    (".attention.relative_position_bias.", ".attention.self."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
BACKBONE_PARTS = ("encoder.", "embeddings.")


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that published checkpoints have."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, cross, leaf = name.partition(CROSS)
        part, _, what = leaf.partition(".")
        if not cross or part not in PROJECTIONS:
            found[_backbone_to_published(name)] = tensor
        elif part == PROJECTIONS[0]:
            parts = [tensors[f"{head}{CROSS}{other}.{what}"] for other in PROJECTIONS]
            found[f"{head}{CROSS}in_proj_{what}"] = torch.cat(parts)
    return found


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that the network in memory has."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, cross, leaf = name.partition(f"{CROSS}in_proj_")
        if cross:
            parts = zip(PROJECTIONS, tensor.tensor_split(3), strict=True)
            found |= {f"{head}{CROSS}{part}.{leaf}": values.contiguous() for part, values in parts}
        else:
            found[_backbone_from_published(name)] = tensor
    return found


def _backbone_to_published(name: str) -> str:
    if not name.startswith(BACKBONE):
        return name
    for new, old in BACKBONE_NAMES:
        name = name.replace(new, old)
    for part in BACKBONE_PARTS:
        name = name.replace(f"{BACKBONE}swin.{part}", f"{BACKBONE}{part}")
    return name


def _backbone_from_published(name: str) -> str:
    if not name.startswith(BACKBONE):
        return name
    for part in BACKBONE_PARTS:
        if name.startswith(BACKBONE + part):
            name = name.replace(BACKBONE, f"{BACKBONE}swin.", 1)
    for new, old in BACKBONE_NAMES:
        if old == ".attention.self." and not name.endswith("relative_position_bias_table"):
            continue  # this one stands before a tensor's name, not a module's
        name = name.replace(old, new)
    return name
