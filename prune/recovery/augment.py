"""Stronger augmentation for recovery, through timm's factories: policies on images, mixing and erasing in batches.

Shapes: B images, C channels, H and W pixels. timm, which takes a second to import, is needed by few runs and imported
where it is called.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot

from data.base import Batch, Classification, DataBundle
from data.images import AUGMENTATION, ImageBatches
from data.segmentation_task import Segmentation
from models.base import PrunableModel
from models.preprocessing import ImagePreprocessing
from utils.errors import InputError
from utils.training import TrainBatches

if TYPE_CHECKING:
    from timm.data import Mixup  # type: ignore[attr-defined]

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images beyond what the data does already.

    Attributes:
        policy: One of timm's, such as `rand-m9-mstd0.5-inc1` or `original`; None for none.
        mixup: Parameter of the Beta distribution of mixup (Zhang et al., 2018, arXiv:1710.09412); 0: none.
        cutmix: The same of CutMix (Yun et al., 2019, arXiv:1905.04899).
        erase: Probability of erasing a rectangle (Zhong et al., 2020, arXiv:1708.04896).
    """

    policy: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return bool(self.policy or self.mixup or self.cutmix or self.erase)


def augmented(batches: TrainBatches, how: Augmentation, data: DataBundle, model: PrunableModel) -> TrainBatches:
    """The same training batches with more augmentation.

    A policy takes the place of the image source's own random transforms where it has such,
    else it acts on the finished tensors.

    Raises:
        InputError: If the data are no images, timm does not know the policy, or mixing has no labels to mix.
    """
    if not how.changes:
        return batches
    asked = f"recover.augment={how.policy}, recover.mixup={how.mixup}, recover.cutmix={how.cutmix}, " \
            f"recover.erase={how.erase}"  # fmt: skip
    shape = data.example["inputs"].shape if "inputs" in data.example else ()
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise InputError(f"{asked}: data={data.name} must have images of 1 or 3 channels; all four must be off")
    if (how.mixup or how.cutmix) and not isinstance(data.task, Classification):
        raise InputError(f"{asked}: data={data.name} has no class labels to mix; recover.mixup and cutmix must be 0")
    if how.policy and isinstance(data.task, Segmentation):
        raise InputError(f"{asked}: it would move pixels of data={data.name} and not their labels; it must be off")
    policy = _policy(how.policy) if how.policy else None
    if isinstance(batches, ImageBatches) and isinstance(model.preprocessing, ImagePreprocessing) and how.policy:
        batches, policy = _with_policy(batches, model.preprocessing, how.policy), None
    classes = data.task.classes if isinstance(data.task, Classification) else 0
    return AugmentedBatches(batches, policy, how, classes)


class AugmentedBatches:
    """Training batches that are changed as they come; what is drawn follows from the global seeds of the epoch."""

    def __init__(self, batches: TrainBatches, policy: Any, how: Augmentation, classes: int) -> None:
        from timm.data import Mixup  # type: ignore[attr-defined]
        from timm.data.random_erasing import RandomErasing

        self.batches, self.classes = batches, classes
        self.policy: Any = policy
        self.erase: Any = RandomErasing(how.erase, mode="pixel", device="cpu") if how.erase else None
        mixes = how.mixup > 0 or how.cutmix > 0
        self.mix = Mixup(how.mixup, how.cutmix, label_smoothing=0.0, num_classes=classes) if mixes else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            images = batch["inputs"]
            if self.policy is not None:
                images = by_policy(images, self.policy)
            if self.erase is not None:
                images = self.erase(images.clone())
            batch = {**batch, "inputs": images}
            yield mixed(batch, self.mix, self.classes) if self.mix is not None else batch


def by_policy(images: Tensor, policy: Any) -> Tensor:
    """Pass each of (B, C, H, W) through a policy for 8-bit images; the batch's own range is mapped to 0..255."""
    low, high = images.aminmax()
    scale = 255 / (high - low).clamp_min(1e-12)
    pixels = ((images - low) * scale).round().byte().expand(-1, 3, -1, -1)
    changed = [policy(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in pixels]
    found = torch.stack([torch.from_numpy(np.asarray(one).copy()) for one in changed]).permute(0, 3, 1, 2)
    found = found.to(images.dtype) / scale + low
    return found if images.shape[1] == 3 else found.mean(dim=1, keepdim=True)


def mixed(batch: Batch, mix: "Mixup", classes: int) -> Batch:
    """Mix images and labels; labels become (B, classes). Of an odd number the last stays as it is."""
    images, labels = batch["inputs"], batch["labels"]
    even = len(images) - len(images) % 2
    left = images[even:], one_hot(labels[even:], classes).float()
    if even == 0:
        return {**batch, "labels": left[1]}
    pairs = mix(images[:even].clone(), labels[:even])
    inputs, soft = (torch.cat(parts) for parts in zip(pairs, left, strict=True))
    return {**batch, "inputs": inputs, "labels": soft}


def _policy(name: str) -> Any:
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    settings = {"translate_const": 4, "img_mean": GREY}
    try:
        found = rand_augment_transform if name.startswith("rand") else auto_augment_transform
        return found(name, settings)
    except Exception as error:  # timm asserts, or looks the name up
        known = "rand-m9-mstd0.5-inc1, original, v0, 3a and their like"
        raise InputError(f"recover.augment={name}: timm has no such policy ({error!r}); it has {known}") from error


def _with_policy(batches: ImageBatches, images: ImagePreprocessing, name: str) -> ImageBatches:
    from timm.data import create_transform  # type: ignore[attr-defined]

    twin, settings = copy.copy(batches), {**asdict(images), **AUGMENTATION, "auto_augment": name}
    twin.transform = create_transform(**settings, is_training=True)  # type: ignore[assignment]
    return twin
