"""Products by oneDNN: the same figures as torch's own, and only where nothing else is asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import Recipe
from models.visiting import settle
from prune.weights import products
from prune.weights.cholesky import inverse_factored
from prune.weights.products import linear, product, quick_linears
from prune.weights.statistics import Gram, SquaredNorms
from prune.weights.walk import Walk
from tests.sparse import Causal, tiny_llama
from utils.hooks import hooked, is_replayed, replaying

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LYING = {
    "plain": lambda: noise(6, 5, 12),
    "two dimensions": lambda: noise(7, 12),
    "one": lambda: noise(12),
    "gaps between rows": lambda: noise(6, 5, 20)[..., 3:15],
    "some of the tokens": lambda: noise(6, 9, 12)[:, ::2],
    "turned": lambda: noise(6, 12, 5).mT,
    "stretched": lambda: noise(1, 5, 12).expand(6, -1, -1),
    "nothing": lambda: noise(0, 5, 12),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", LYING.values(), ids=LYING.keys())
def test_a_linear_gives_what_torch_gives_however_its_input_lies(make: Callable[[], Tensor], bias: bool) -> None:
    x, added = make(), noise(8, seed=2) if bias else None
    for weight in (noise(8, 12, seed=1), noise(8, 30, seed=1)[:, 2:14], noise(12, 8, seed=1).T):
        wanted = functional.linear(x.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(linear(x, weight, added).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_product_gives_what_torch_gives_however_its_factors_lie() -> None:
    for left in (noise(5, 7), noise(7, 5).T, noise(5, 20)[:, 3:10]):
        for right in (noise(7, 6, seed=1), noise(6, 7, seed=1).T, noise(7, 20, seed=1)[:, 2:8]):
            wanted = left.double() @ right.double()
            torch.testing.assert_close(product(left, right).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_build_without_onednn_computes_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    x, weight = noise(4, 6), noise(3, 6, seed=1)
    assert linear(x, weight).equal(functional.linear(x, weight)) and product(x, weight.T).equal(x @ weight.T)


def test_what_else_is_asked_for_is_left_to_torch() -> None:
    x, weight = noise(4, 6), noise(3, 6, seed=1)
    half = linear(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16 and linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    weight.requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(3, -1))
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


class Doubled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_linears_of_a_block_answer_by_it_with_their_hooks() -> None:
    network = nn.ModuleDict(
        {"block": nn.Sequential(nn.Linear(6, 6), Doubled(6, 6), nn.GELU()), "head": nn.Linear(6, 2)}
    )
    block, x, read = network.get_submodule("block"), noise(4, 6), []
    answers, wanted = quick_linears(network, "block"), block(x)
    assert list(answers) == ["block.0"], "one with a forward of its own keeps it, and what lies outside stays"
    first = network.get_submodule("block.0")
    assert isinstance(first, nn.Linear)
    with replaying(network, answers), hooked(before=[(first, lambda module, args: read.append(args[0]))]):
        torch.testing.assert_close(block(x), wanted)
        assert read[0] is x and list(quick_linears(network, "block")) == []
        first.weight.mul_(0)  # the weight is looked up when it is called
        assert torch.equal(first(x), first.bias.expand(4, -1))
    assert not is_replayed(network)


@pytest.mark.parametrize("offload", [False, True])
def test_a_block_is_left_at_its_last_linear(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are those of whole passes, to the bit; the product of the last linear is not taken for them."""
    model, data = tiny_llama()
    if offload:
        settle(model, CPU, visiting=True)
    batches = [
        {n: t[i : i + 2] for n, t in b.items()} for b in data.calibration for i in range(0, len(b["input_ids"]), 2)
    ]
    assert len(batches) > 2
    ran: list[tuple[int, int]] = []
    original = products.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ran.append(tuple(weight.shape))  # type: ignore[arg-type]
        return original(x, weight, bias)

    monkeypatch.setattr(products, "linear", counting)
    found: list[dict[str, Tensor]] = []
    for go_on in (False, True):
        walk = Walk(model, batches, CPU, offload)
        names = [name for name, m in model.network.named_modules() if ".layers.0." in name and isinstance(m, nn.Linear)]
        ran.clear()
        with walk.resident(0):
            stages = walk.statistics(0, names, SquaredNorms, go_on=go_on)
        # that of the first batch tells whether any linear runs once more
        assert ran.count((16, 24)) == (len(batches) if go_on else 1) and ran.count((24, 16)) == 2 * len(batches)
        found.append({name: statistic.norms() for stage, statistic in stages for name in stage})
        assert [stage for stage, _ in stages][0][0].endswith("q_proj") and len(stages) == 4
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


class Backwards(nn.Module):
    """Linears that run in another order than they are named, the last of which reads what the first has read."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.first(x).relu())
        return y + self.last(x)


@torch.no_grad()
def test_an_unusual_order_is_followed() -> None:
    class Stack(Causal):
        def blocks(self) -> tuple[str, ...]:
            return ("0", "1")

        def logits(self, batch: dict[str, Tensor]) -> Tensor:
            return self.network(batch["inputs"])

    model = Stack(nn.Sequential(Backwards(), Backwards(), nn.Linear(8, 3)), Recipe("tests.backwards", {}))
    batches = [{"inputs": noise(2, 4, 8, seed=seed)} for seed in range(3)]
    read: dict[str, list[Tensor]] = {}
    names = [f"{block}.{part}" for block in (0, 1) for part in ("last", "middle", "first")]

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: read.setdefault(name, []).append(args[0].flatten(0, 1))

    with hooked(before=[(model.network.get_submodule(name), keep(name)) for name in names]):
        for batch in batches:
            model.logits(batch)
    walk = Walk(model, batches, CPU, offload=False)
    for layer in (0, 1):
        stages = walk.statistics(layer, names[3 * layer : 3 * layer + 3], Gram)
        assert [stage for stage, _ in stages] == [(f"{layer}.first", f"{layer}.last"), (f"{layer}.middle",)]
        for (name, *_), statistic in stages:
            x = torch.cat(read[name])
            assert isinstance(statistic, Gram)
            torch.testing.assert_close(statistic.gram(), 2 / 6 * x.T @ x, rtol=1e-4, atol=1e-4)
        walk.advance(layer)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 300, 513])
def test_the_inverse_is_factored(size: int) -> None:
    x = noise(2 * size, size).double()
    h = x.T @ x / size + 0.1 * torch.eye(size)
    wanted = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    upper = inverse_factored(h.float())
    assert upper is not None and torch.equal(upper, upper.triu())
    assert float((upper - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("place", [0, 100, 160, 299])
@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_what_is_not_positive_definite_is_seen_wherever_it_is(place: int, value: float) -> None:
    x = noise(600, 300)
    h = x.T @ x / 300
    assert inverse_factored(h) is not None
    h[place, place] = value
    assert inverse_factored(h) is None
