"""Every adapter that the contract tests cover: a model with a batch; a new family is one line."""

from collections.abc import Callable
from functools import partial

import torch

from data.base import Classification, DataBundle, Task, TensorBatches
from data.language_modelling import LanguageModelling
from data.regression import Regression
from data.segmentation_task import Segmentation
from data.squad_task import QuestionAnswering
from models.base import Batch, PrunableModel
from models.bert import LAYOUTS, bert
from models.hf import Head
from models.llama import llama
from models.resnet import resnet
from models.toy_encoder import toy_encoder
from models.vit import vit
from tests.mask2former_models import least_mask2former
from tests.modules import CLASSES, TOKENS, WIDTH, conv_model, fused_model, grouped_model, stirred
from tests.timm_small import timm_small

Adapter = Callable[[], tuple[PrunableModel, Batch]]


def batch(*shape: int, samples: int = 6, classes: int = CLASSES) -> Batch:
    """Random inputs of a shape, with labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (samples,), generator=generator)
    return {"inputs": torch.randn(samples, *shape, generator=generator), "labels": labels}


def toy_on_images() -> tuple[PrunableModel, Batch]:
    """Two layers on 8x8 images; weights large enough for an error to show."""
    model = toy_encoder(classes=CLASSES, image_size=8, width=24, depth=2, heads=4, neurons=20)
    stirred(model.network)
    return model, batch(1, 8, 8)


def toy_on_tokens() -> tuple[PrunableModel, Batch]:
    """Two layers on given token vectors."""
    model = toy_encoder(classes=CLASSES, tokens=6, token_width=9, width=24, depth=2, heads=3, neurons=16)
    stirred(model.network)
    return model, batch(6, 9)


def timm_vit(name: str, **settings: object) -> tuple[PrunableModel, Batch]:
    """A timm vision transformer of two small blocks on 16x16 images."""
    small = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 1.0, **settings}
    model = vit(name=name, classes=CLASSES, image_size=16, settings=small)
    stirred(model.network)
    return model, batch(3, 16, 16)


def timm_resnet(name: str) -> tuple[PrunableModel, Batch]:
    """A timm ResNet with one narrow block a stage on 32x32 images."""
    channels = [8, 12, 16, 20]
    model = resnet(name=name, classes=CLASSES, settings={"layers": [1, 1, 1, 1], "channels": channels, "stem_width": 8})
    stirred(model.network)
    return model, batch(3, 32, 32)


def encoder(kind: str, classes: int = CLASSES, head: Head = "classification") -> tuple[PrunableModel, Batch]:
    """Two layers of a BERT-like encoder on sequences of unequal length."""
    sizes: dict[str, object] = {
        "vocab_size": 50,
        "max_position_embeddings": 24,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    if kind == "distilbert":
        sizes |= {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 20}
    else:
        sizes |= {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    model = bert(classes=classes, head=head, settings={"model_type": kind, **sizes})
    stirred(model.network)
    samples = texts(classes)
    if head == "question_answering":
        start = samples.pop("labels") % 4
        samples |= {"start": start, "end": start, "window": torch.arange(6)}
    return model, samples


def causal(kind: str, **settings: object) -> tuple[PrunableModel, Batch]:
    """Two layers of a Llama-like language model, three KV heads under six query heads, with padded samples."""
    sizes: dict[str, object] = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 20, "max_position_embeddings": 24,
    }  # fmt: skip
    model = llama(settings={"model_type": kind, **sizes, **settings})
    stirred(model.network)
    samples = texts(CLASSES)
    return model, {name: samples[name] for name in ("input_ids", "attention_mask")}


def texts(classes: int) -> Batch:
    """Random token ids with padding, and labels; a float each where there is one class."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([9, 7, 9, 4, 6, 8])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(3, 50, (6, 9), generator=generator) * mask
    labels = torch.randn(6, generator=generator) if classes == 1 else torch.randint(classes, (6,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ADAPTERS: dict[str, Adapter] = {
    "toy_images": toy_on_images,
    "toy_tokens": toy_on_tokens,
    "fused_qkv": lambda: (fused_model(), batch(TOKENS, WIDTH)),
    "grouped_query": lambda: (grouped_model(), batch(TOKENS, WIDTH)),
    "conv": lambda: (conv_model(), batch(4, 6, 6)),
    "deit": lambda: timm_vit("deit_tiny_patch16_224"),
    "deit_distilled": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
    "vit_swiglu": lambda: timm_vit("vit_giant_patch14_dinov2", mlp_ratio=2.0, init_values=0.7),
    "vit_qk_norm": lambda: timm_vit("vit_base_patch16_224", qk_norm=True, class_token=False, global_pool="avg"),
    "resnet_basic": lambda: timm_resnet("resnet18"),
    "resnet_bottleneck": lambda: timm_resnet("resnet50"),
    **{kind: partial(timm_small, kind) for kind in ("swin", "eva02", "convnext")},
    "mask2former": least_mask2former,
    **{kind.replace("-", "_"): partial(encoder, kind) for kind in LAYOUTS},
    "llama": lambda: causal("llama", attention_bias=True, mlp_bias=True),
    "llama_plain": lambda: causal("llama", head_dim=None),
    "mistral": lambda: causal("mistral", sliding_window=4),
    "qwen2": lambda: causal("qwen2"),
    "qwen3": lambda: causal("qwen3", head_dim=6),
    "bert_regression": lambda: encoder("bert", classes=1),
    "bert_question_answering": lambda: encoder("bert", head="question_answering"),
    "distilbert_question_answering": lambda: encoder("distilbert", head="question_answering"),
}


def bundle_of(samples: Batch, batches: int = 3) -> DataBundle:
    """A data set of one batch, split for calibration."""
    parts = [
        dict(zip(samples, rows, strict=True))
        for rows in zip(*(t.tensor_split(batches) for t in samples.values()), strict=True)
    ]
    task: Task = QuestionAnswering() if "start" in samples else Classification(CLASSES)
    if "labels" in samples and samples["labels"].ndim == 3:
        height, width = samples["inputs"].shape[2:]
        task = Segmentation(CLASSES, (height // 4, width // 4))
    if "labels" not in samples and "start" not in samples:
        task = LanguageModelling(vocabulary=50)
    if "labels" in samples and samples["labels"].is_floating_point():
        task = Regression()
    return DataBundle(
        name="handmade",
        domain="synthetic",
        task=task,
        calibration=parts,
        train=TensorBatches(samples, batch_size=2, shuffle_seed=0),
        train_samples=len(next(iter(samples.values()))),
        validation=parts,
        example={name: tensor[:1] for name, tensor in samples.items()},
        fingerprints={"train": "t", "calibration": "c", "validation": "v"},
    )
