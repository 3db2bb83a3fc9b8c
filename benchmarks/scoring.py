"""First-order scores and the search, against the plain way of doing the same.

Scores: one gate a unit, no weight gradients, against a backward pass that computes the
gradient of every weight and a loop over units that sums weight times gradient. Both give
the same numbers; the largest relative difference is printed.

Search: counts on integer costs with a heap, against removing one unit at a time and
recounting the whole model after each, as a mask-based search does.

python -m benchmarks.scoring
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from data.base import Classification, DataBundle, TensorBatches
from models.cost import CostModel, cost_model
from models.toy_encoder import ToyEncoder, toy_encoder
from prune.budget import Budget
from prune.gates import gate_gradients
from prune.rankers.fisher import fisher
from prune.search import select_units
from utils.environment import describe_device, resolve_device

BUDGET = Budget("macs", 0.4)


def deit_shape(width: int, heads: int, depth: int = 12) -> ToyEncoder:
    """Random weights at a DeiT's shape."""
    torch.manual_seed(0)
    return toy_encoder(
        classes=1000,
        image_size=224,
        patch_size=16,
        channels=3,
        width=width,
        depth=depth,
        heads=heads,
        neurons=4 * width,
    )


def images(batches: int, batch_size: int) -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    found = [
        {
            "inputs": torch.randn(batch_size, 3, 224, 224, generator=generator),
            "labels": torch.randint(1000, (batch_size,), generator=generator),
        }
        for _ in range(batches)
    ]
    train = TensorBatches(found[0], batch_size)
    example = {"inputs": found[0]["inputs"][:1]}
    return DataBundle("noise", "synthetic", Classification(1000), found, train, 0, found, example, {})


def naive_fisher(model: ToyEncoder, data: DataBundle) -> dict[str, Tensor]:
    """Gradients of all weights, then a Python loop over units."""
    scores = {g.name: torch.zeros(g.count) for g in model.unit_groups()}
    for batch in data.calibration:
        placed = model.place(batch)
        model.network.zero_grad()
        data.task.loss(model.logits(placed), placed).backward()
        for group in model.unit_groups():
            weight = model.network.get_parameter(f"{group.consumer.module}.weight")
            assert weight.grad is not None
            for unit in range(group.count):
                columns = group.consumer.index[unit].to(weight.device)
                product = weight.detach()[:, columns] * weight.grad[:, columns]
                scores[group.name][unit] += float(product.sum()) ** 2
    return scores


def naive_search(scores: dict[str, Tensor], costs: CostModel, budget: Budget) -> dict[str, int]:
    """Remove the unit with the lowest score per cost, recount the model, repeat."""
    kept = dict(costs.counts)
    cost = {name: costs.total("macs") - costs.total("macs", kept | {name: kept[name] - 1}) for name in kept}
    order = sorted((float(v) / cost[name], name) for name, values in scores.items() for v in values)
    limit = budget.limit(costs.total("macs"))
    for _, name in order:
        if costs.total("macs", kept) <= limit:
            break
        if kept[name] > budget.min_keep:
            kept[name] -= 1
    return kept


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, mine in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    device = resolve_device(options.device)
    print(describe_device(device), "torch", torch.__version__)
    print("\n| what | ours s | plain s | ratio | agreement |\n|---|--:|--:|--:|---|")

    data = images(batches=2, batch_size=options.batch_size)
    for name, model in {"DeiT-Ti": deit_shape(192, 3), "DeiT-S": deit_shape(384, 6)}.items():
        model.network.to(device)
        mine = {group: fisher(values) for group, values in gate_gradients(model, data, "ours").items()}
        plain = naive_fisher(model, data)
        worst = max(float(((mine[g] - plain[g]).abs() / plain[g].abs().max()).max()) for g in mine)
        ours, theirs = interleaved(
            lambda m=model: gate_gradients(m, data, "ours"), lambda m=model: naive_fisher(m, data), options.repeats
        )
        print(f"| fisher, {name} shape, 2 batches of {options.batch_size} | {ours:.2f} | {theirs:.2f} | "
              f"{theirs / ours:.1f}x | largest relative difference {worst:.1e} |")  # fmt: skip

        costs = cost_model(model, data.example)
        ours, theirs = interleaved(
            lambda s=mine, c=costs: select_units(s, c, BUDGET), lambda s=mine, c=costs: naive_search(s, c, BUDGET), 1
        )
        counts = {group: len(index) for group, index in select_units(mine, costs, BUDGET).items()}
        more = sum(counts.values()) - sum(naive_search(mine, costs, BUDGET).values())
        print(f"| search, {name} shape, {sum(costs.counts.values()):,} units | {ours:.3f} | {theirs:.2f} | "
              f"{theirs / ours:.0f}x | ours keeps {more} more units within the budget |")  # fmt: skip


if __name__ == "__main__":
    main()
