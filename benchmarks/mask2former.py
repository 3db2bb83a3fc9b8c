"""Mask2Former with Swin-T at full size and random weights, dense against 30% of the MACs removed.

Units go by magnitude. What is left must give what masking gives. The decoder hides places by whether a mask's logit
is negative, so that in float32 a logit within rounding of zero can fall on either side and move one query by more than
rounding; equality is therefore also checked in float64 (`--double`). Both models are timed interleaved.

python -m benchmarks.mask2former --side 512
"""

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from evals.macs import counted_macs
from evals.timing import Protocol, speedup, time_interleaved
from models.base import Batch
from models.cost import cost_model
from models.mask2former import Mask2Former, mask2former
from prune.base import Plan
from prune.rankers.magnitude import Magnitude
from prune.surgery import cut, masked

# the sizes of facebook/mask2former-swin-tiny-ade-semantic
SWIN_TINY = {
    "backbone_config": {
        "model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
        "drop_path_rate": 0.3, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "num_queries": 100,
}  # fmt: skip


def swin_tiny(classes: int = 150, side: int = 512) -> Mask2Former:
    """The published sizes for ADE20K, at random weights of seed 0."""
    torch.manual_seed(0)
    return mask2former(classes=classes, image_size=side, settings=SWIN_TINY)


def image(model: Mask2Former, samples: int = 1) -> Batch:
    """Random images of the model's size."""
    shape = model.preprocessing.input_size
    return {"inputs": torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))}


def without(model: Mask2Former, ratio: float) -> Plan:
    """A plan that removes a share of the MACs, by magnitude."""
    ranker = Magnitude(ratio=ratio)
    scores = Magnitude.rank(ranker, model, None)  # type: ignore[arg-type]  # it looks at no data
    return ranker.plan(model, scores, cost_model(model, image(model)))


@torch.inference_mode()
def differences(model: Mask2Former, plan: Plan, pruned: Mask2Former, batch: Batch) -> Tensor:
    """How far each query's answer of the cut model is from the masked one's, (B, Q)."""
    with masked(model, plan):
        expected = model.logits(batch)
    return (pruned.logits(batch) - expected).abs().amax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--double", action="store_true", help="check equality in float64, and time nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="spent on each model, about")
    arguments = parser.parse_args()
    dense = swin_tiny(side=arguments.side)
    plan = without(dense, arguments.ratio)
    if arguments.double:
        dense.network.double()
    pruned, batch = cut(dense, plan), dense.place(image(dense))
    macs = [cost_model(model, batch).total("macs") for model in (dense, pruned)]
    print(f"MACs {macs[0]:,} -> {macs[1]:,} ({macs[1] / macs[0]:.4f}), counted {counted_macs(pruned, batch):,}")
    print("parameters", *(f"{sum(p.numel() for p in model.network.parameters()):,}" for model in (dense, pruned)))
    apart = differences(dense, plan, pruned, batch)
    print(f"masked against removed: median query {float(apart.median()):.1e}, largest {float(apart.max()):.1e}")
    if arguments.double:
        return
    calls = [partial(torch.inference_mode()(model.logits), batch) for model in (dense, pruned)]
    protocol = Protocol(warmup=2, blocks=3, seconds=arguments.seconds, least_calls=6)
    times = time_interleaved(calls, dense.device, protocol)
    medians = [statistics.median(timings.all_ms) for timings in times]
    print(f"ms {medians[0]:.0f} -> {medians[1]:.0f}, speed-up {speedup(*times)}, by MACs {macs[0] / macs[1]:.2f}")


if __name__ == "__main__":
    main()
