"""OPTIN's sketched ranking against the exact one on real weights and images: seconds against agreement.

Exact losses are computed for every n-th neuron of each layer, the sketch for all of them; the
plain loop's seconds are extrapolated from a few units a group.

python -m benchmarks.optin_sketch --checkpoint deit_tiny_patch16_224.safetensors --images <folder with train/ and val/>
"""

import argparse
import time
from dataclasses import replace

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.optin_exact import compare
from data.base import DataBundle
from data.imagenet import imagenet
from models.base import PrunableModel
from models.vit import vit
from prune.gates import undisturbed
from prune.optin.candidates import group_losses
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings, observe


def exact_sample(model: PrunableModel, data: DataBundle, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Exact MD (final point included) and KD of every `step`-th neuron, layer by layer."""
    found: list[dict[str, Tensor]] = []
    with undisturbed(model.network), torch.inference_mode():
        teacher = observe(model, data.calibration[0], settings)
        for group in (group for group in model.unit_groups() if group.kind == "neuron"):
            index = group.consumer.index[::step]
            part = replace(group, count=len(index), consumer=replace(group.consumer, index=index))
            found.append(group_losses(model, data, teacher, part, settings, lambda note: None))
    return torch.cat([f["md"] + f["md_final"] for f in found]).cpu(), torch.cat([f["kd"] for f in found]).cpu()


def agreement(estimate: Tensor, exact: Tensor) -> tuple[float, float]:
    """Spearman correlation, and the share of the best half that both name."""
    half = len(exact) // 2
    both = set(estimate.topk(half).indices.tolist()) & set(exact.topk(half).indices.tolist())
    return float(spearmanr(estimate.numpy(), exact.numpy())[0]), len(both) / half  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--step", type=int, default=19, help="every n-th neuron exactly")
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 16, 32, 64])
    arguments = parser.parse_args()
    model = vit(name="deit_tiny_patch16_224", checkpoint=arguments.checkpoint)
    source = imagenet(root=arguments.images, calibration_batches=1, calibration_batch_size=arguments.batch, workers=0)
    data, settings = source.prepare(model), Settings()
    with undisturbed(model.network), torch.inference_mode():
        plain, *_ = compare(model, data, settings, 3)
    start = time.perf_counter()
    md, kd = exact_sample(model, data, settings, arguments.step)
    print(f"exact: {len(md)} neurons in {time.perf_counter() - start:.0f} s; plain loop over all units: {plain:.0f} s")
    print("| R | s | against the plain loop | MD Spearman | MD best half | KD Spearman | median estimate / exact |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    kept: list[Tensor] = []
    for probes in arguments.probes:
        start = time.perf_counter()
        losses = sketched_losses(model, data, settings, probes)
        seconds = time.perf_counter() - start
        names = [group.name for group in model.unit_groups() if group.kind == "neuron"]
        kept = [torch.cat([losses[term][name][:: arguments.step] for name in names]) for term in ("md", "kd")]
        rank, overlap = agreement(kept[0], md)
        ratio = float((kept[0] / md).median())
        print(
            f"| {probes} | {seconds:.1f} | {plain / seconds:.0f}x | {rank:.3f} | {overlap:.3f} | "
            f"{agreement(kept[1], kd)[0]:.3f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
