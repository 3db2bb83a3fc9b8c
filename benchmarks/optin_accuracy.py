"""What the sketch costs in accuracy: DeiT cut by exact scores and by sketches of several probe counts and seeds.

Rankings are kept in `--storage`, so that a second call goes on. Accuracy is that of the really cut
model on all validation images; differences are paired image by image. Prints markdown.

python -m benchmarks.optin_accuracy --checkpoint deit_tiny_patch16_224.safetensors --images <folder>
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from benchmarks.optin_sketch import agreement
from data.base import DataBundle
from data.imagenet import imagenet
from models.base import Batch, PrunableModel
from models.cost import CostModel, cost_model
from models.vit import vit
from prune.base import Scores
from prune.rankers.optin import Optin
from prune.ranking import ranked
from utils.storage import Store


def right_answers(model: PrunableModel, batches: Sequence[Batch]) -> Tensor:
    """Which validation images a model gets right, (images,)."""
    with torch.inference_mode():
        found = [model.logits(model.place(batch)).argmax(dim=1).cpu() == batch["labels"] for batch in batches]
    return torch.cat(found).float()


class Bench:
    """A model, its data, and the accuracy of every way to rank it."""

    def __init__(self, model: PrunableModel, data: DataBundle, store: Store, ratios: Sequence[float]) -> None:
        self.model, self.data, self.store, self.ratios = model, data, store, ratios
        self.costs: CostModel = cost_model(model, data.example)
        self.batches = list(data.validation)

    def ranking(self, **settings: object) -> tuple[Scores, float]:
        """Scores of one setting of OPTIN, and the seconds that they took (0 where they were kept)."""
        start = time.perf_counter()
        found = ranked(Optin(**settings), self.model, self.data, self.store)  # type: ignore[arg-type]
        return found.scores, 0.0 if found.hit else time.perf_counter() - start

    def cut(self, scores: Scores) -> dict[float, Tensor]:
        """Right answers at every ratio."""
        found = {}
        for ratio in self.ratios:
            method = Optin(ratio=ratio)
            found[ratio] = right_answers(
                method.apply(self.model, method.plan(self.model, scores, self.costs)), self.batches
            )
        return found


def neurons_of(model: PrunableModel, scores: Scores, term: str) -> Tensor:
    """One term of all neurons, the final feature point included in MD."""
    names = [group.name for group in model.unit_groups() if group.kind == "neuron"]
    final = scores.terms.get("md_final") if term == "md" else None
    return torch.cat([scores.terms[term][name] + (final[name] if final else 0.0) for name in names])


def row(label: str, seconds: float, overlap: str, runs: Sequence[Mapping[float, Tensor]],
        exact: Mapping[float, Tensor]) -> str:  # fmt: skip
    """Mean accuracy over runs at each ratio, the spread over them, and the paired difference to exact scores."""
    cells = []
    for ratio, reference in exact.items():
        accuracies = [100 * float(run[ratio].mean()) for run in runs]
        differences = torch.stack([run[ratio] - reference for run in runs]).mean(dim=0)
        error = 100 * float(differences.std()) / len(differences) ** 0.5
        spread = f" ({stdev(accuracies):.2f})" if len(accuracies) > 1 else ""
        versus = "" if run_is(runs, exact) else f" {100 * float(differences.mean()):+.2f}±{error:.2f}"
        cells.append(f"{mean(accuracies):.2f}{spread}{versus}")
    return f"| {label} | {seconds:.0f} | {overlap} | " + " | ".join(cells) + " |"


def run_is(runs: Sequence[Mapping[float, Tensor]], exact: Mapping[float, Tensor]) -> bool:
    """Whether the only run is the reference itself."""
    return len(runs) == 1 and runs[0] is exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--storage", default="storage")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 24, 96])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    arguments = parser.parse_args()
    model = vit(name="deit_tiny_patch16_224", checkpoint=arguments.checkpoint)
    source = imagenet(root=arguments.images, calibration_batches=1, calibration_batch_size=arguments.batch, workers=0)
    bench = Bench(model, source.prepare(model), Store(Path(arguments.storage)), arguments.ratios)
    print(f"dense {100 * float(right_answers(model, bench.batches).mean()):.2f} on {len(bench.batches)} batches")
    titles = " | ".join(f"{ratio:.0%}" for ratio in arguments.ratios)
    print(f"| ranking | s | MD best half | {titles} |\n|---|--:|--:|" + "--:|" * len(arguments.ratios), flush=True)
    scores, seconds = bench.ranking(engine="exact", seed=0)
    exact, wanted = bench.cut(scores), neurons_of(model, scores, "md")
    print(row("exact", seconds, "", [exact], exact), flush=True)
    for probes in arguments.probes:
        found = [bench.ranking(engine="sketch", probes=probes, seed=seed) for seed in range(arguments.seeds)]
        overlap = mean(agreement(neurons_of(model, scores, "md"), wanted)[1] for scores, _ in found)
        runs = [bench.cut(scores) for scores, _ in found]
        spent = mean(seconds for _, seconds in found)
        print(row(f"sketch, R = {probes}", spent, f"{overlap:.3f}", runs, exact), flush=True)


if __name__ == "__main__":
    main()
