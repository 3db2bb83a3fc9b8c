"""OPTIN's exact engine in several processes against one, a thread each: how much of a second process is left.

Each repetition starts a fresh process, then a fresh group of them, on the same model and batches; the time is that
of the scoring alone, from the moment at which all are ready to the one at which all have the scores. The scores of
both must be the same to the bit, or the benchmark fails. Medians over the repetitions.

python -m benchmarks.distributed --processes 2 --repeat 5
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.base import Classification, DataBundle, TensorBatches
from models.vit import vit
from prune.optin.exact import exact_losses
from prune.optin.teacher import Settings
from utils.distributed import gathered, is_first
from utils.joining import joined

ROOT = Path(__file__).parent.parent
SIZES = {"embed_dim": 192, "depth": 4, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 16}


def bundle(batches: int, samples: int) -> DataBundle:
    """Random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * samples, 3, 96, 96, generator=generator)
    tensors = {"inputs": images, "labels": torch.zeros(len(images), dtype=torch.int64)}
    parts = [{name: tensor[i::batches] for name, tensor in tensors.items()} for i in range(batches)]
    return DataBundle(
        name="random", domain="synthetic", task=Classification(10), calibration=parts,
        train=TensorBatches(tensors, samples), train_samples=len(images), validation=parts,
        example={name: tensor[:1] for name, tensor in tensors.items()},
        fingerprints={"train": "t", "calibration": "c", "validation": "v"},
    )  # fmt: skip


def timed(batches: int, samples: int) -> None:
    """Score in this process, with the others if there are any, and print seconds and a hash of the scores."""
    torch.manual_seed(0)
    model = vit(name="deit_tiny_patch16_224", classes=10, image_size=96, settings=SIZES)
    data = bundle(batches, samples)
    with joined("cpu"):
        gathered(({}, None))
        start = time.perf_counter()
        losses = exact_losses(model, data, Settings())
        gathered(({}, None))
        seconds = time.perf_counter() - start
        digest = hashlib.sha256()
        for term in sorted(losses):
            for name in sorted(losses[term]):
                digest.update(losses[term][name].numpy().tobytes())
        if is_first():
            units = sum(group.count for group in model.unit_groups())
            print(json.dumps({"seconds": seconds, "scores": digest.hexdigest(), "units": units}))


def once(processes: int, batches: int, samples: int) -> dict[str, float | str]:
    """One repetition in fresh processes, one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.distributed", "--timed"]
    sizes = ["--batches", str(batches), "--samples", str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *sizes], cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Interleave both, and say the efficiency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.timed:
        timed(asked.batches, asked.samples)
        return
    found: dict[int, list[float]] = {1: [], asked.processes: []}
    scores = set()
    for _ in range(asked.repeat):
        for count, seconds in found.items():
            run = once(count, asked.batches, asked.samples)
            seconds.append(float(run["seconds"]))
            scores.add(run["scores"])
    if len(scores) > 1:
        sys.exit("the scores differ between one process and several")
    one, several = (statistics.median(seconds) for seconds in found.values())
    print(f"1 process: {one:.2f} s {[round(s, 2) for s in found[1]]}, load now {os.getloadavg()[0]:.1f}")
    print(f"{asked.processes} processes: {several:.2f} s {[round(s, 2) for s in found[asked.processes]]}")
    print(f"speed-up {one / several:.2f}, efficiency {one / several / asked.processes:.1%}; scores equal to the bit")


if __name__ == "__main__":
    main()
