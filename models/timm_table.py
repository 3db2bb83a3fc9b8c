"""Further families of timm, a row each; `docs/models.md` says how to add one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.metaformer import MetaFormer, Pooling, SepConv
from timm.models.mlp_mixer import MlpMixer
from timm.models.xcit import Xcit

from models.base import Recipe
from models.timm_family import DERIVED, Family, TimmFamily, Whole
from models.timm_models import assembled
from utils.rules import Count, ExistingPath, checked
from utils.training import Training


def shared_bias(network: Any) -> str | None:
    """BEiT's heads of all blocks may share one table of positions."""
    if network.rel_pos_bias is not None:
        return "rel_pos_bias is one table of positions for the heads of all blocks (use_shared_rel_pos_bias)"
    return None


def mixed_rope(network: Any) -> str | None:
    """EVA's rotary frequencies may be of their own for every head of every block."""
    if network.rope_mixed:
        return "rope has frequencies of its own for every head, those of all blocks in one tensor (rope_type=mixed)"
    return None


FAMILIES = (
    Family(Beit, odd=shared_bias),
    Family(Eva, odd=mixed_rope, whole=(Whole("attn_pool", "kv"),)),
    # the head's norm is behind the pooling
    Family(ConvNeXt, blocks="stages.*.blocks.*", attention=None, point=None, final=()),
    # its heads are mixed with each other before and after the softmax
    Family(
        Cait, attention=None, final=("norm",),
        whole=(Whole("blocks.*.attn", "qkv"), Whole("blocks_token_only.*.attn", "k")),
    ),
    Family(Xcit, final=("norm",), whole=(Whole("cls_attn_blocks.*.attn", "k"),)),
    Family(
        MetaFormer, blocks="stages.*.blocks.*", attention="token_mixer", headless=(Pooling, SepConv), point=None,
        final=(),
    ),
    # ResMLP has one MLP a block, a mixer two
    Family(MlpMixer, attention=None, mlps=("mlp_tokens", "mlp_channels"), final=("norm",)),
)  # fmt: skip


@checked
def timm_model(
    *,
    name: str,
    classes: Count | None = None,
    image_size: Count | None = None,
    pretrained: bool = False,
    checkpoint: ExistingPath | None = None,
    new_head: bool = False,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> TimmFamily:
    """Build a network of any family in the table.

    Args:
        name: timm's name, such as `beitv2_base_patch16_224`.
        classes: Width of the classifier; None takes the architecture's own.
        image_size: Side of the images in pixels, where the architecture is built for one size; None takes its own.
        pretrained: Take the weights that timm publishes under the name, from the hub.
        checkpoint: A `.safetensors` or `.pth` file, or a folder; wins over `pretrained`.
        new_head: Put a fresh classifier on the loaded weights and train on first use.
        settings: Further arguments of timm's model.
        training: How to train where the weights are not complete.

    Raises:
        InputError: If timm does not know the name, its family has no row, a part can't be cut
            exactly, or weights are missing or don't fit.
    """
    arguments = {"name": name, "classes": classes, "image_size": image_size, "settings": dict(settings or {})}
    return assembled(
        partial(TimmFamily, families=FAMILIES), Recipe("models.timm_table.timm_model", arguments, exact_name=True),
        pretrained=pretrained, checkpoint=checkpoint, new_head=new_head, training=training, derived=DERIVED,
    )  # fmt: skip
