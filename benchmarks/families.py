"""Latency of full-size shapes, dense against half of their heads and neurons, in one run.

Random weights: a shape's speed does not depend on them. Both models are timed interleaved
(dense, pruned, pruned, dense), by the code that `evals=[latency]` runs.

python -m benchmarks.families
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from evals.timing import Protocol, speedup, time_interleaved
from models.base import Batch, PrunableModel
from models.bert import bert
from models.cost import cost_model
from models.resnet import resnet
from models.vit import vit
from prune.base import Plan
from prune.surgery import cut

SHAPES: dict[str, Callable[[], PrunableModel]] = {
    "DeiT-S": lambda: vit(name="deit_small_patch16_224"),
    "DeiT-B": lambda: vit(name="deit_base_patch16_224"),
    "BERT-base, 128 tokens": lambda: bert(classes=2, settings={"model_type": "bert"}),
    "ResNet-50 (half of the inner channels)": lambda: resnet(name="resnet50"),
}


def samples_of(model: PrunableModel, count: int) -> Batch:
    """Random inputs of the published shape."""
    if "bert" in model.name:
        ids = torch.randint(1000, 30000, (count, 128))
        return model.place({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return model.place({"inputs": torch.randn(count, 3, 224, 224)})


def halved(model: PrunableModel) -> PrunableModel:
    """Every second unit of every group."""
    return cut(model, Plan.of(model, {g.name: torch.arange(0, g.count, 2) for g in model.unit_groups()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="spent on each model, about")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(f"| model, batch {arguments.batch} | dense ms | half ms | half / dense | MACs left |\n|---|--:|--:|--:|--:|")
    for name, build in SHAPES.items():
        torch.manual_seed(0)
        dense = build()
        dense.network.to(arguments.device)
        pruned = halved(dense)
        batch = samples_of(dense, arguments.batch)
        calls = [partial(model.logits, batch) for model in (dense, pruned)]
        protocol = Protocol(warmup=3, blocks=5, seconds=arguments.seconds, least_calls=10)
        timings = time_interleaved(calls, torch.device(arguments.device), protocol)
        one = samples_of(dense, 1)
        macs = [cost_model(model, one).total("macs") for model in (dense, pruned)]
        before, after = (statistics.median(timing.all_ms) for timing in timings)
        print(f"| {name} | {before:.0f} | {after:.0f} | {1 / speedup(*timings):.2f} | {macs[1] / macs[0]:.2f} |")


if __name__ == "__main__":
    main()
