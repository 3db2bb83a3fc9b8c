"""Wrong ways to cut must be seen by the tests that hold masking and cutting equal; and tied weights."""

import pytest
import torch
from torch import nn

from evals.base import Subject
from evals.macs import counted_macs
from evals.params import Params
from evals.size import Size
from models.base import Consumer, PrunableModel, Recipe, UnitGroup, rows, unit_index
from models.checkpoint import load_weights, save_model
from models.cost import cost_model
from prune.base import Plan
from prune.surgery import cut, masked
from tests.adapters import ADAPTERS, bundle_of
from tests.modules import CLASSES, stirred
from tests.test_contract import logits, random_plan


def difference(model: PrunableModel, pruned: PrunableModel, plan: Plan, samples) -> float:
    with masked(model, plan):
        expected = logits(model, samples)
    return float((logits(pruned, samples) - expected).abs().max())


def test_a_rescaled_attention_is_seen() -> None:
    model, samples = ADAPTERS["toy_images"]()
    plan = random_plan(model, 0)
    pruned = cut(model, plan)
    for block in pruned.network.get_submodule("blocks"):  # type: ignore[union-attr]
        block.attention.scale = (24 / max(1, block.attention.heads)) ** -0.5  # type: ignore[union-attr]
    assert difference(model, pruned, plan, samples) > 1e-2


def test_a_forgotten_bias_is_seen() -> None:
    """Zeroing the first linear's weight but not its bias is no mask."""
    model, samples = ADAPTERS["toy_images"]()
    group = model.unit_groups()[1]
    plan = Plan.of(model, {group.name: torch.arange(1, group.count)})
    wrong = model.copy()
    wrong.network.get_parameter("blocks.0.fc1.weight").data[0] = 0
    assert difference(model, wrong, plan, samples) > 1e-3
    wrong.network.get_parameter("blocks.0.fc1.bias").data[0] = 0
    assert difference(model, wrong, plan, samples) <= 1e-5


class TiedNetwork(nn.Module):
    """An MLP between an embedding and a head that share their weight; one linear runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.up, self.down, self.twice = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.twice(self.twice(x)).mean(dim=1))


class Tied(PrunableModel):
    """Neurons of the MLP as units."""

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        index = unit_index(self.network.get_submodule("up").out_features, 1)  # type: ignore[arg-type]
        return (
            UnitGroup(
                "neurons", "neuron", 0, len(index), 1, rows(self.network, "up", index), Consumer("down", -1, index)
            ),
        )

    def blocks(self) -> tuple[str, ...]:
        return ()

    def feature_points(self) -> tuple[str, ...]:
        return ()

    def logits(self, batch):
        return self.network(batch["inputs"])


def tied() -> tuple[Tied, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    samples = {"inputs": torch.randint(CLASSES, (6, 5), generator=generator), "labels": torch.arange(6)}
    return Tied(stirred(TiedNetwork()), Recipe("tests.tied", {})), samples


def test_tied_weights_and_modules_called_twice_are_counted_right(tmp_path) -> None:
    model, samples = tied()
    example = {name: tensor[:1] for name, tensor in samples.items()}
    assert cost_model(model, example).total("macs") == counted_macs(model, example)
    parameters = sum(p.numel() for p in model.network.parameters())
    assert cost_model(model, example).total("params") == parameters
    subject = Subject(model, bundle_of(samples))
    assert Params().measure([subject])[0]["params"].value == parameters

    pruned = cut(model, random_plan(model, 0))
    folder = save_model(pruned, tmp_path / "model")
    measured = Size().measure([Subject(pruned, subject.data)])[0]["size"].value
    assert measured == (folder / "model.safetensors").stat().st_size
    reloaded = load_weights(tied()[0], str(folder))
    assert torch.equal(logits(reloaded, samples), logits(pruned, samples))
    assert reloaded.network.get_parameter("head.weight") is reloaded.network.get_parameter("embed.weight")


def test_cutting_a_tied_weight_is_refused_before_anything_is_cut() -> None:
    model, _ = tied()
    model.network.register_module("other", nn.Linear(12, 8))
    model.network.get_submodule("other").weight = model.network.get_submodule("down").weight
    with pytest.raises(ValueError, match="down.weight and other.weight are tied"):
        cut(model, random_plan(model, 0))
