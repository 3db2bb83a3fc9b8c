"""Residual convolution networks from timm: the inner channels of every block."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from models.base import Batch, Consumer, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.timm_models import assembled, write_stock
from utils.errors import InputError
from utils.rules import Count, ExistingPath, checked
from utils.training import Training

INNER = {BasicBlock: 1, Bottleneck: 2}


class ResNet(PrunableModel):
    """Channels between the convolutions of a residual block; the stream that blocks add to stays whole."""

    network: TimmResNet
    fixed_blocks = "the first block of every stage changes width and resolution, so that a residual network needs it"

    def __init__(self, network: nn.Module, recipe: Recipe, training: Training | None = None) -> None:
        refuse_uncovered(network, recipe.arguments["name"])
        super().__init__(network, recipe, training)

    @property
    def name(self) -> str:
        """Timm's name of the architecture."""
        return self.recipe.arguments["name"]

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """One group for each inner width: one in a basic block, two in a bottleneck."""
        return tuple(
            self._channels(layer, block, number)
            for layer, block in enumerate(self.blocks())
            for number in range(1, 1 + INNER[type(self.network.get_submodule(block))])  # type: ignore[index]
        )

    def blocks(self) -> tuple[str, ...]:
        """Residual blocks from input to output."""
        return tuple(name for name, _ in residual_blocks(self.network))

    def feature_points(self) -> tuple[str, ...]:
        """The output of every block."""
        return self.blocks()

    def logits(self, batch: Batch) -> Tensor:
        """Class logits, (B, C)."""
        return self.network(batch["inputs"])

    def stock_files(self, folder: Path) -> str | None:
        """Timm can express the widths of the architecture and no others."""
        if any(group.count != self.dense_counts[group.name] for group in self.unit_groups()):
            return "timm has no argument for the inner width of a single block"
        write_stock(self, folder, {})
        return None

    def _channels(self, layer: int, block: str, number: int) -> UnitGroup:
        convolution, norm, reader = f"{block}.conv{number}", f"{block}.bn{number}", f"{block}.conv{number + 1}"
        count = len(self.network.get_submodule(convolution).weight)  # type: ignore[arg-type]
        index = unit_index(count, 1)
        return UnitGroup(
            name=f"{block}.channels{number}",
            kind="channel",
            layer=layer,
            count=count,
            width=1,
            producers=(*rows(self.network, convolution, index), *rows(self.network, norm, index)),
            consumer=Consumer(reader, 1, index),
        )


def residual_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a network's residual blocks, in execution order."""
    for name, module in network.named_modules():
        if isinstance(module, BasicBlock | Bottleneck):
            yield name, module


def refuse_uncovered(network: nn.Module, name: str) -> None:
    """Raise an InputError that names the first part of a network that this adapter can't cut exactly."""
    if not isinstance(network, TimmResNet):
        raise InputError(f"model.name={name}: is a {type(network).__name__}; model=resnet takes timm's ResNet")
    for block_name, block in residual_blocks(network):
        if why := _uncovered(block):
            raise InputError(f"model.name={name}: {block_name} cannot be cut exactly: {why}")


def _uncovered(block: nn.Module) -> str | None:
    """Why a block is not covered, or None."""
    if type(block) not in INNER:
        return f"it is a {type(block).__name__}; BasicBlock and Bottleneck are covered"
    if block.conv2.groups != 1:  # type: ignore[union-attr]
        return "its grouped convolution ties channels to each other"
    if not isinstance(block.aa, nn.Identity):
        return "its anti-aliasing filter keeps a width of its own"
    norms = [block.get_submodule(f"bn{number}") for number in range(1, 1 + INNER[type(block)])]  # type: ignore[index]
    if odd := next((type(norm).__name__ for norm in norms if not isinstance(norm, nn.BatchNorm2d)), None):
        return f"its norm is a {odd}, not a batch norm"
    return None


@checked
def resnet(
    *,
    name: str,
    classes: Count | None = None,
    pretrained: bool = False,
    checkpoint: ExistingPath | None = None,
    new_head: bool = False,
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> ResNet:
    """Build any of timm's ResNets with plain basic or bottleneck blocks.

    Args:
        name: timm's name, such as `resnet50`.
        classes: Width of the classifier; None takes the architecture's own.
        pretrained: Take the weights that timm publishes under the name, from the hub.
        checkpoint: A `.safetensors` or `.pth` file, or a folder; wins over `pretrained`.
        new_head: Put a fresh classifier on the loaded weights and train on first use.
        settings: Further arguments of timm's model, such as `layers`.
        training: How to train where the weights are not complete.

    Raises:
        InputError: If timm does not know the name, a block can't be cut exactly, or
            weights are missing or don't fit.
    """
    arguments = {"name": name, "classes": classes, "settings": dict(settings or {})}
    return assembled(
        ResNet, Recipe("models.resnet.resnet", arguments, exact_name=True),
        pretrained=pretrained, checkpoint=checkpoint, new_head=new_head, training=training,
    )  # fmt: skip
