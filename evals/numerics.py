"""What the last digits of a figure depend on beside the model and its data."""

from typing import Any

import torch

from models.base import PrunableModel
from utils.environment import package_versions

PACKAGES = ("torch", "transformers", "tokenizers", "datasets")
SDPA_KERNELS = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}


def numerics(model: PrunableModel) -> dict[str, Any]:
    """Dtypes, the attention that is used, and versions, as plain values.

    `sdpa_kernels` are those that torch may choose from for `sdpa`; None where attention is computed otherwise.
    Losses are taken from logits in float32 and summed in float64.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    on_cuda = model.device.type == "cuda"
    return {
        "dtype": dtype,
        "compute_dtype": "tf32" if on_cuda and dtype == "float32" and torch.backends.cuda.matmul.allow_tf32 else dtype,
        "loss_dtype": "float32",
        "attention": model.attention,
        "sdpa_kernels": sdpa_kernels() if model.attention == "sdpa" else None,
        "versions": package_versions(PACKAGES),
    }


def sdpa_kernels() -> list[str]:
    """Kernels of scaled dot-product attention that are switched on."""
    return [name for name, enabled in SDPA_KERNELS.items() if enabled()]
