"""OPTIN's exact engine against the plain loop that the published code runs.

The plain loop masks one unit at a time by a hook, runs the whole network, and computes whole
losses: features normalised and Grams of both models for every unit, one number to the host.
Both score the same sample of units on the same model, batch and device, interleaved layer by
layer; the plain loop always in float32. Totals are extrapolated: the engine prepares once a
group and then takes so much a unit, told apart by timing a few units and a few more.

python -m benchmarks.optin_exact --checkpoint deit_tiny_patch16_224.safetensors
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.base import Batch, Classification, DataBundle, TensorBatches
from models.base import PrunableModel, UnitGroup
from models.bert import bert
from models.vit import vit
from prune.gates import gated, undisturbed
from prune.optin.candidates import group_losses
from prune.optin.precision import computed_in
from prune.optin.teacher import Settings, Teacher, compared_points, observe
from utils.hooks import captured

SHAPES: dict[str, Callable[[str | None], PrunableModel]] = {
    "deit_tiny": lambda path: vit(name="deit_tiny_patch16_224", checkpoint=path),
    "deit_small": lambda path: vit(name="deit_small_patch16_224", checkpoint=path),
    "bert_base": lambda path: bert(classes=3, checkpoint=path, settings=None if path else {"model_type": "bert"}),
}


def samples_of(model: PrunableModel, count: int) -> Batch:
    """Random inputs of the published shape."""
    if "bert" in model.name:
        ids = torch.randint(1000, 30000, (count, 128))
        return model.place({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return model.place({"inputs": torch.randn(count, 3, 224, 224)})


def plain_loss(model: PrunableModel, data: DataBundle, dense: dict[str, Tensor], wanted: Tensor, group: UnitGroup,
               unit: int, settings: Settings) -> tuple[float, float]:  # fmt: skip
    """MD and KD of one unit, the published way."""
    gate = torch.ones(group.count)
    gate[unit] = 0
    with gated(model, {group.name: gate}), captured(model.network, model.feature_points()) as found:
        given = model.logits(data.calibration[0])
    distance = torch.zeros((), device=given.device)
    for name in compared_points(model, group.layer):
        x, y = (normalize(side[name].float(), dim=-1).flatten(0, 1) for side in (dense, found))
        rows = torch.randperm(len(x), device=x.device)[: settings.rows]
        distance = distance + (x[rows] @ x[rows].T - y[rows] @ y[rows].T).square().sum()
    deviation = data.task.deviation(given, wanted, data.calibration[0]).sum()
    return float(distance), float(settings.temperature**2 * deviation)


def compare(model: PrunableModel, data: DataBundle, settings: Settings, sample: int) -> tuple[float, float, int]:
    """Extrapolated seconds of the plain loop and of ours over all units, and how many were timed."""
    with computed_in(settings.precision, model.device):
        teacher = observe(model, data.calibration[0], settings)
    with captured(model.network, model.feature_points()) as dense:
        wanted = model.logits(data.calibration[0])
    plain_total = ours_total = 0.0
    timed = 0
    for group in model.unit_groups():
        few = min(sample, group.count)
        plain = _seconds(
            model,
            lambda g=group, n=few: [  # type: ignore[misc]
                plain_loss(model, data, dense, wanted, g, unit, settings) for unit in range(n)
            ],
        )
        start, all_of_them = (
            _seconds(model, lambda g=group, n=number: _ours(model, data, teacher, g, n, settings))  # type: ignore[misc]
            for number in (few // 3, few)
        )
        each = (all_of_them - start) / (few - few // 3)
        plain_total += plain / few * group.count
        ours_total += all_of_them + each * (group.count - few)
        timed += few
    return plain_total, ours_total, timed


def _ours(
    model: PrunableModel, data: DataBundle, teacher: Teacher, group: UnitGroup, few: int, settings: Settings
) -> None:
    """The engine on the first units of a group."""
    part = replace(group, count=few)
    with computed_in(settings.precision, model.device):
        losses = group_losses(model, data, teacher, part, settings, lambda note: None)
    losses["md"].cpu()


def _seconds(model: PrunableModel, work: Callable[[], object]) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deit_tiny")
    parser.add_argument("--checkpoint", help="weights; random ones without")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sample", type=int, default=32, help="units timed a group, at most")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], help="tf32 on CUDA, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = SHAPES[arguments.shape](arguments.checkpoint)
    model.network.to(arguments.device)
    batch = samples_of(model, arguments.batch)
    task = Classification(model.logits({n: t[:1] for n, t in batch.items()}).shape[1])
    data = DataBundle("noise", "synthetic", task, [batch], TensorBatches(batch, 1), 0, [batch], batch, {})
    units = sum(group.count for group in model.unit_groups())
    print(f"{arguments.shape}, batch {arguments.batch}, {arguments.device}")
    print("| engine in | units timed | plain loop, s | engine, s | ms a unit | speed-up |\n|---|--:|--:|--:|--:|--:|")
    with undisturbed(model.network), torch.inference_mode():
        for precision in arguments.precisions:
            compare(model, data, Settings(precision=precision), 3)  # warm-up
            plain, ours, timed = compare(model, data, Settings(precision=precision), arguments.sample)
            row = f"{precision} | {timed} of {units} | {plain:.0f} | {ours:.0f} | {1000 * ours / units:.1f}"
            print(f"| {row} | {plain / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
