"""Torch's compiler takes a network that drops or merges tokens whole, and it answers as before."""

from collections.abc import Callable

import pytest
import torch

from models.base import Batch, PrunableModel
from models.keeping import Keeping, Rule
from models.merging import Reduction
from prune.tokens.attention_threshold import MostReceived
from prune.tokens.evit import ClassAttention
from prune.tokens.random_k import RandomTokens
from prune.tokens.threshold_l2 import LargestNorms
from prune.tokens.value_attention import ValueAttention
from tests.test_keeping import MODELS, dropping, logits

STEPS = (0.7, 0.6)
RULES: dict[str, Callable[[], Rule]] = {
    "evit": lambda: ClassAttention(STEPS, 1),
    "norm": lambda: LargestNorms(STEPS, 1),
    "received": lambda: MostReceived(STEPS, 1),
    "value_attention": lambda: ValueAttention(STEPS, 1),
    "random": lambda: RandomTokens(STEPS, 1),
}


def compiled(model: PrunableModel, samples: Batch) -> torch.Tensor:
    """The logits by one graph, which is traced as for any backend but not made into code."""
    torch._dynamo.reset()
    with torch.inference_mode():
        return torch.compile(model.logits, backend="eager", fullgraph=True, dynamic=False)(samples)


def agrees(model: PrunableModel, samples: Batch) -> None:
    torch.testing.assert_close(compiled(model, samples), logits(model, samples), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", ["none", "mean"])
@pytest.mark.parametrize("rule", RULES)
def test_dropping_compiles_whole(rule: str, fuse: str) -> None:
    model, samples = MODELS["deit"]()
    agrees(dropping(model, Keeping(RULES[rule](), (0, 1), 3, fuse=fuse)), samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["toy", "registers"])
def test_other_networks_do_too(name: str) -> None:
    model, samples = MODELS[name]()
    agrees(dropping(model, Keeping(RULES["norm"](), (0, 1), 3)), samples)


@pytest.mark.parametrize("how", [Reduction((3, 2, 0)), Reduction((3, 2, 0), front_only=True)])
def test_merging_compiles_whole(how: Reduction) -> None:
    model, samples = MODELS["deit"]()
    model.reduce_tokens(how)
    agrees(model, samples)
