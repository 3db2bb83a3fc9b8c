"""What the tests of weight sparsity share: applying a method, and models to apply it to."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from data.base import DataBundle
from models.base import Batch, PrunableModel, Recipe, UnitGroup
from models.cost import CostModel
from prune.base import Plan
from prune.rewriting import Applied
from prune.weights.method import WeightSparsity
from tests.adapters import bundle_of
from tests.modules import stirred
from utils.storage import Store

NO_COSTS = CostModel((), {}, {})


def applied_to(method: WeightSparsity, model: PrunableModel, data: DataBundle, folder: Path) -> Applied:
    """Plan and carry out, as a run does."""
    plan = method.plan(model, method.rank(model, data), NO_COSTS)
    return method.apply_on(model, plan, data, Store(folder))


def weights(model: PrunableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def masks_of(model: PrunableModel, plan: Plan) -> dict[str, Tensor]:
    return {m.name: linear(model, m.name).weight.detach() == 0 for m in plan.matrices}


def linear(model: PrunableModel, name: str) -> nn.Linear:
    found = model.network.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rebatched(data: DataBundle, batches: Sequence[Batch]) -> DataBundle:
    """The same data with other calibration batches, and a fingerprint that says so."""
    number = f"{len(batches)}-{sum(float(t.float().sum()) for b in batches for t in b.values())}"
    prints = {**data.fingerprints, "calibration": number}
    return type(data)(**{**vars(data), "calibration": batches, "fingerprints": prints})


def joined(batches: Sequence[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def split(batch: Batch, size: int) -> list[Batch]:
    count = len(next(iter(batch.values())))
    return [{n: t[i : i + size] for n, t in batch.items()} for i in range(0, count, size)]


class Causal(PrunableModel):
    """A causal language model of transformers, without units: rotary tables, grouped queries, tied embeddings."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        return ()

    def blocks(self) -> tuple[str, ...]:
        return tuple(f"model.layers.{i}" for i in range(self.network.config.num_hidden_layers))  # type: ignore[union-attr]

    def feature_points(self) -> tuple[str, ...]:
        return self.blocks()

    def logits(self, batch: Batch) -> Tensor:
        return self.network(input_ids=batch["input_ids"], use_cache=False).logits


def tiny_llama() -> tuple[PrunableModel, DataBundle]:
    """Three layers, four heads on two key heads, head and embedding tied."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    stirred(network)
    network.tie_weights()
    ids = torch.randint(40, (6, 10), generator=torch.Generator().manual_seed(3))
    model = Causal(network, Recipe("tests.sparse.tiny_llama", {}))
    return model, bundle_of({"input_ids": ids, "labels": torch.zeros(6, dtype=torch.int64)})
