"""Small random networks of timm's families, each with the parts that make it awkward to cut."""

from collections.abc import Callable

from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    Pooling,
    SepConv,
)
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn

from models.base import Batch, PrunableModel, Recipe
from models.swin import swin
from models.timm_family import TimmFamily
from models.timm_table import FAMILIES, timm_model
from tests.modules import CLASSES, stirred

SIZES: dict[str, tuple[str, int | None, dict[str, object]]] = {
    # windows of 3 on maps of 9 and 5 tokens a side: shifted, padded, and merged to an odd size
    "swin": ("swin_tiny_patch4_window7_224", 18, {
        "patch_size": 2, "window_size": 3, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0,
    }),
    "swin_head_width": ("swin_s3_tiny_224", 16, {
        "patch_size": 2, "window_size": [4, 2], "embed_dim": 8, "depths": [1, 2], "num_heads": [3, 2], "head_dim": 3,
        "mlp_ratio": 1.5, "qkv_bias": False, "always_partition": True,
    }),
    "swin_v2": ("swinv2_tiny_window8_256", 18, {
        "patch_size": 2, "window_size": 3, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0,
    }),
    "beit": ("beit_base_patch16_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "init_values": 0.7,
    }),
    "eva02": ("eva02_tiny_patch14_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5,
    }),
    "eva_split": ("eva_giant_patch14_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "qkv_fused": False,
        "qk_norm": True, "num_reg_tokens": 2, "global_pool": "map", "init_values": 0.6,
    }),
    "eva_rope": ("vit_small_patch16_rope_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5,
    }),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0,
    }),
    "convnext": ("convnext_tiny", None, {
        "depths": [1, 2, 1, 1], "dims": [8, 8, 12, 16], "kernel_sizes": 3, "ls_init_value": 0.7,
    }),
    "convnext_conv": ("convnext_nano", None, {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 16], "conv_mlp": True}),
    "cait": ("cait_xxs24_224", 12, {
        "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "depth_token_only": 1, "init_values": 0.5,
    }),
    "xcit": ("xcit_nano_12_p16_224", 32, {
        "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "cls_attn_layers": 1,
    }),
}  # fmt: skip
# networks whose sizes timm states by name alone
BUILT: dict[str, Callable[[], nn.Module]] = {
    "poolformer": lambda: MetaFormer(num_classes=CLASSES, depths=(1, 1, 1), dims=(8, 8, 12), token_mixers=Pooling),
    "caformer": lambda: MetaFormer(
        num_classes=CLASSES, depths=(1, 1, 1), dims=(8, 12, 64), token_mixers=[SepConv, SepConv, Attention],
        norm_layers=[LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias], use_mlp_head=True,
    ),
    "mixer": lambda: MlpMixer(CLASSES, img_size=12, patch_size=4, num_blocks=2, embed_dim=16),
    "resmlp": lambda: MlpMixer(
        CLASSES, img_size=12, patch_size=4, num_blocks=2, embed_dim=16, mlp_ratio=2, block_layer=ResBlock,
        norm_layer=Affine,
    ),
}  # fmt: skip
SIDES = {"convnext": 32, "convnext_conv": 32, "poolformer": 32, "caformer": 36, "mixer": 12, "resmlp": 12}


def timm_small(kind: str, **settings: object) -> tuple[PrunableModel, Batch]:
    """A small network of a family with random weights everywhere, and a batch for it."""
    from tests.adapters import batch

    if kind in BUILT:
        model = TimmFamily(BUILT[kind](), Recipe("tests", {"name": kind}), families=FAMILIES)
        side = None
    else:
        name, side, sizes = SIZES[kind]
        build = swin if kind.startswith("swin") else timm_model
        model = build(name=name, classes=CLASSES, image_size=side, settings={**sizes, **settings})
    stirred(model.network)
    size = side or SIDES[kind]
    return model, batch(3, size, size)
