"""Weight sparsity against the published loops, on the same model, calibration and device.

The loops are in benchmarks/published_weights.py. All ways of a method run in turns; medians count, wall time and the
process's own time on the CPUs (which other work on the machine disturbs less). Masks are compared, and with a real
model and text perplexities. `parts` is where our time goes; the floor is what the passes' matrix products would take
at the speed that one of them has here by itself.

python -m benchmarks.weights --shape small
python -m benchmarks.weights --checkpoint ../shared/data/llama_baby --text ../shared/data/text/tinystories --length 256
python -m benchmarks.weights --shape llama_1b --device cuda --dtype bfloat16 --offload
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.published_weights import loop_pattern, published_columns, published_sparsegpt, published_wanda
from data.base import Classification, DataBundle, TensorBatches, prepared
from evals.base import Subject
from evals.perplexity import Perplexity
from main import CONFIGS
from models.base import PrunableModel
from models.llama import llama
from models.visiting import settle
from prune.weights.masks import Pattern, pattern_mask
from prune.weights.method import WeightSparsity
from prune.weights.products import linear
from prune.weights.sequential import rewritten, written
from prune.weights.sparsegpt import SparseGPT, inverse_factor, sparsegpt
from prune.weights.statistics import Gram, SquaredNorms
from prune.weights.walk import Walk
from prune.weights.wanda import Wanda
from utils.config import build
from utils.from_python import configured
from utils.storage import Scratch, Store


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and of its calibration."""

    width: int
    neurons: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    samples: int
    length: int
    batch: int


SHAPES = {
    "tiny": Shape(128, 512, 2, 4, 2, 256, 8, 32, 4),
    "small": Shape(512, 2048, 4, 8, 2, 1024, 32, 128, 8),
    "medium": Shape(768, 3072, 6, 12, 4, 1024, 32, 128, 8),
    "llama_1b": Shape(2048, 8192, 16, 32, 8, 128_256, 128, 2048, 8),
}


def random_llama(shape: Shape, dtype: torch.dtype) -> PrunableModel:
    torch.manual_seed(0)
    sizes = {
        "model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.width,
        "intermediate_size": shape.neurons, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads, "max_position_embeddings": shape.length, "tie_word_embeddings": True,
    }  # fmt: skip
    model = llama(settings=sizes)
    model.network.to(dtype)
    return model


def calibration(shape: Shape) -> DataBundle:
    ids = torch.randint(shape.vocabulary, (shape.samples, shape.length), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(shape.batch)]
    example = {"input_ids": ids[:1]}
    return DataBundle("noise", "synthetic", Classification(2), batches, TensorBatches(example, 1), 0, [], example, {})


def real(checkpoint: str, text: str, length: int, batch: int, folder: Path) -> tuple[PrunableModel, DataBundle]:
    """A trained model, calibrated on 128 windows of its training text."""
    values = {
        "model": "llama", "model.checkpoint": checkpoint, "data": "text", "data.root": text, "data.length": length,
        "data.calibration_length": length, "data.calibration_batch_size": batch,
    }  # fmt: skip
    cfg, _ = configured(values, CONFIGS)
    model = build(cfg.model)
    return model, prepared(build(cfg.data), model, Store(folder))


@dataclass
class Times:
    """Seconds of one way to do something, run by run, and what came out last."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    found: Any = None

    def run(self, work: Callable[[], Any], device: str) -> None:
        """Time one run, the device's part included."""
        self.found = None
        wait_for(device)
        start, cpu = time.perf_counter(), time.process_time()
        self.found = work()
        wait_for(device)
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - cpu)


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(ways: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, Times]:
    found = {name: Times() for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            found[name].run(work, device)
    return found


def ours(method: WeightSparsity, model: PrunableModel, data: DataBundle) -> PrunableModel:
    with tempfile.TemporaryDirectory() as folder:
        found = rewritten(method, model, data, Scratch(Path(folder) / "weights.partial"))
    return written(model, found.tensors)


def in_place(model: PrunableModel, work: Callable[[PrunableModel], None]) -> PrunableModel:
    copy = model.copy()
    work(copy)
    return copy


def linears(model: PrunableModel) -> Iterator[nn.Linear]:
    for name in model.blocks():
        for module in model.network.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                yield module


def agreement(first: PrunableModel | Tensor, second: PrunableModel | Tensor) -> float:
    """Share of the weights that are zero in both or in neither."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return float(((first == 0) == (second == 0)).double().mean())
    assert isinstance(first, PrunableModel) and isinstance(second, PrunableModel)
    pairs = [(a.weight == 0, b.weight == 0) for a, b in zip(linears(first), linears(second), strict=True)]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@contextmanager
def split_times(device: str) -> Iterator[dict[str, float]]:
    """Seconds inside forwards, statistics and selections, of what runs inside a `with`."""
    spent: dict[str, float] = {"forward": 0.0, "statistics": 0.0, "selection": 0.0}

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait_for(device)
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                wait_for(device)
                spent[part] += time.perf_counter() - start

        return run

    places = [(Walk, "forward", "forward"), (SquaredNorms, "add", "statistics"), (Gram, "add", "statistics")]
    places += [(Wanda, "solve", "selection"), (SparseGPT, "solve", "selection")]
    patches = [mock.patch.object(kind, name, timed(part, getattr(kind, name))) for kind, name, part in places]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()
        spent["forward"] -= spent["statistics"]


def floor_seconds(model: PrunableModel, data: DataBundle, device: str) -> float:
    """Least time of the passes' products: all linears of a block twice, but the last to run and the last block once."""
    blocks, rows = [model.network.get_submodule(name) for name in model.blocks()], data.calibration[0]["input_ids"]
    tokens = sum(batch["input_ids"].numel() for batch in data.calibration)
    sizes = [[m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
    macs = tokens * (sum(sum(s[:-1]) for s in sizes) + sum(map(sum, sizes[:-1])))
    weight = next(linears(model)).weight.detach()
    wide = torch.randn(4 * weight.shape[1], weight.shape[1], dtype=weight.dtype).to(device)
    x = torch.randn(rows.numel(), weight.shape[1], dtype=weight.dtype).to(device)
    times = in_turns({"mm": lambda: [linear(x, wide) for _ in range(10)]}, device, 7)["mm"]
    # the process's own time on a CPU: other work does not count there
    return macs / (10 * x.numel() * len(wide)) * min(times.cpu if device == "cpu" else times.wall)


class Report:
    """Prints one table, row by row."""

    def __init__(self, model: PrunableModel, data: DataBundle, device: str, repeats: int, length: int | None) -> None:
        self.model, self.data, self.device, self.repeats, self.length = model, data, device, repeats, length
        print("| what | wall s | CPU s | ratio, wall | ratio, CPU | equal masks | perplexity | parts |")
        print("|---|--:|--:|--:|--:|--:|--:|---|")

    def compare(self, name: str, loop: Callable[[], Any], mine: dict[str, Callable[[], Any]], more: int = 0) -> None:
        """Run all ways in turns and print a row of each."""
        found = in_turns({"published": loop, **mine}, self.device, self.repeats + more)
        base = found["published"]
        for way, times in found.items():
            ratios = [median(base.wall) / median(times.wall), median(base.cpu) / median(times.cpu)]
            masks = agreement(base.found, times.found)
            # batches that go abreast wait for each other inside their forwards
            whole = isinstance(times.found, PrunableModel) and way in mine and "one_forward" not in way
            parts = self._parts(mine[way]) if whole else ""
            print(
                f"| {name}, {way} | {median(times.wall):.3f} | {median(times.cpu):.3f} | {ratios[0]:.2f} "
                f"| {ratios[1]:.2f} | {masks:.4%} | {self._perplexity(times.found)} | {parts} |",
                flush=True,
            )

    def _parts(self, work: Callable[[], Any]) -> str:
        times = Times()
        with split_times(self.device) as spent:
            times.run(work, self.device)
        rest = times.wall[0] - sum(spent.values())
        return ", ".join(f"{name} {s / times.wall[0]:.0%}" for name, s in {**spent, "rest": rest}.items())

    def _perplexity(self, found: Any) -> str:
        if self.length is None or not isinstance(found, PrunableModel):
            return ""
        value = Perplexity(length=self.length, batch=16).measure([Subject(found, self.data)])[0]["perplexity"].value
        return f"{value:.4f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--checkpoint", help="a Llama's folder, in place of a shape")
    parser.add_argument("--text", help="folder with train*.txt and validation*.txt, for a checkpoint")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window of that text")
    parser.add_argument("--batch", type=int, default=8, help="windows of that text in a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--offload", action="store_true", help="keep only the current block on the device")
    parser.add_argument("--only", nargs="*", choices=["patterns", "wanda", "columns", "sparsegpt"])
    parser.add_argument("--ways", nargs="*", default=["default", "one_forward", "bfloat16"], help="of ours")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def ways_of(kind: type[WeightSparsity], report: Report, chosen: Sequence[str], offload: bool) -> dict[str, Callable]:
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "one_forward": {"schedule": "one_forward"},
        "bfloat16": {"precision": "bfloat16"},
    }
    return {
        f"ours, {way}": lambda s=settings[way]: ours(kind(offload=offload, **s), report.model, report.data)
        for way in chosen
    }


def compare_patterns(report: Report) -> None:
    scores = torch.rand(2048, 8192, generator=torch.Generator().manual_seed(0)).to(report.device)
    for pattern in (Pattern(2, 4), Pattern(4, 8)):
        report.compare(
            f"{pattern.zeros}:{pattern.of}, one matrix of 2048 x 8192", lambda p=pattern: loop_pattern(scores, p),
            {"ours": lambda p=pattern: pattern_mask(scores, p)}, more=4,
        )  # fmt: skip


def compare_columns(report: Report) -> None:
    weight = list(linears(report.model))[-1].weight.detach().to(report.device)
    gram = Gram()
    gram.add(torch.randn(2 * weight.shape[1], weight.shape[1]).to(report.device), 1)
    factor = inverse_factor(gram.gram(), 0.01)
    report.compare(
        f"SparseGPT's columns, {weight.shape[0]} x {weight.shape[1]}",
        lambda: published_columns(weight.float(), factor.upper, 0.5),
        {"ours": lambda: sparsegpt([weight], factor, [0.5])[0].weight},
    )


def peaks(report: Report, offload: bool) -> None:
    for kind in (Wanda, SparseGPT):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours(kind(offload=offload), report.model, report.data)
        print(f"\nPeak device memory of {kind.__name__}: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB.")


def main() -> None:
    chosen, folder = arguments(), tempfile.TemporaryDirectory()
    torch.set_grad_enabled(False)
    if chosen.checkpoint:
        model, data = real(chosen.checkpoint, chosen.text, chosen.length, chosen.batch, Path(folder.name))
    else:
        model, data = (
            random_llama(SHAPES[chosen.shape], getattr(torch, chosen.dtype)),
            calibration(SHAPES[chosen.shape]),
        )
    settle(model, torch.device(chosen.device), visiting=chosen.offload)
    what = chosen.checkpoint or f"{chosen.shape}: {SHAPES[chosen.shape]}, {chosen.dtype}"
    print(f"{what}, {chosen.device}, {torch.get_num_threads()} CPU threads, offload={chosen.offload}\n")
    report = Report(model, data, chosen.device, chosen.repeats, chosen.length if chosen.checkpoint else None)
    parts = chosen.only or ["patterns", "wanda", "columns", "sparsegpt"]
    if "patterns" in parts:
        compare_patterns(report)
    for name, kind, loop in (("wanda", Wanda, published_wanda), ("sparsegpt", SparseGPT, published_sparsegpt)):
        if name == "sparsegpt" and "columns" in parts:
            compare_columns(report)
        if name in parts:
            ways = ways_of(kind, report, chosen.ways, chosen.offload)
            report.compare(f"{kind.__name__} 50%", lambda f=loop: in_place(model, lambda m: f(m, data, 0.5)), ways)
    print(f"\nFloor of the default's forward passes: {floor_seconds(model, data, chosen.device):.2f} s.")
    if chosen.device == "cuda":
        peaks(report, chosen.offload)


if __name__ == "__main__":
    main()
