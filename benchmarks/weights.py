"""Weight sparsity against the published loops, on the same model, calibration and device.

Wanda's loop: one sample at a time, two forwards a block, a hook on every linear, a full stable
sort. N:m's: one selection after the other over the groups of columns. SparseGPT's: a Gram matrix
for every linear, and one column after the other. Both sides run in turns, the best of each counts;
masks are compared. The loops were written anew from their descriptions.

python -m benchmarks.weights --shape small
python -m benchmarks.weights --shape llama_1b --device cuda --dtype bfloat16 --offload
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.base import Classification, DataBundle, TensorBatches
from models.llama import Llama, llama
from prune.weights.masks import Pattern, pattern_mask
from prune.weights.matrices import linear_of
from prune.weights.method import WeightSparsity
from prune.weights.sequential import rewritten, written
from prune.weights.sparsegpt import SparseGPT, inverse_factor, sparsegpt
from prune.weights.statistics import Gram
from prune.weights.wanda import Wanda
from utils.storage import Scratch


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
    "llama_1b": Shape(2048, 8192, 16, 32, 8, 128_256, 128, 2048, 8),
}


def random_llama(shape: Shape, dtype: torch.dtype, device: str) -> Llama:
    torch.manual_seed(0)
    sizes = {
        "model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.width,
        "intermediate_size": shape.neurons, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads, "max_position_embeddings": shape.length, "tie_word_embeddings": True,
    }  # fmt: skip
    model = llama(settings=sizes)
    model.network.to(device, dtype).requires_grad_(False)
    return model


def calibration(shape: Shape) -> DataBundle:
    ids = torch.randint(shape.vocabulary, (shape.samples, shape.length), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(shape.batch)]
    example = {"input_ids": ids[:1]}
    return DataBundle("noise", "synthetic", Classification(2), batches, TensorBatches(example, 1), 0, [], example, {})


class _Stop(Exception):
    pass


def first_inputs(model: Llama, data: DataBundle) -> list[tuple[Tensor, dict[str, Any]]]:
    """What block 0 is given, sample by sample."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0], kwargs))
        raise _Stop

    handle = model.network.get_submodule(model.blocks()[0]).register_forward_pre_hook(catch, with_kwargs=True)
    for batch in data.calibration:
        for ids in batch["input_ids"].split(1):
            try:
                model.logits({"input_ids": ids.to(model.device)})
            except _Stop:
                pass
    handle.remove()
    return found


Add = Callable[[Tensor, Tensor, int], Tensor]


def published_walk(
    model: Llama, data: DataBundle, start: Callable[[int], Tensor], add: Add, prune: Callable[[nn.Linear, Tensor], None]
) -> None:
    """The published schedule, in place."""
    given = first_inputs(model, data)
    for name in model.blocks():
        block = model.network.get_submodule(name)
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        sums = {id(module): start(module.in_features).to(model.device) for module in linears}
        counts = dict.fromkeys(sums, 0)

        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, sums: dict = sums, counts: dict = counts):
            sums[id(module)] = add(sums[id(module)], args[0].flatten(0, 1).T.float(), counts[id(module)])
            counts[id(module)] += 1

        handles = [module.register_forward_hook(note) for module in linears]
        for x, kwargs in given:
            block(x, **kwargs)
        for handle in handles:
            handle.remove()
        for module in linears:
            prune(module, sums[id(module)])
        given = [(block(x, **kwargs), kwargs) for x, kwargs in given]


def published_wanda(model: Llama, data: DataBundle, share: float) -> None:
    def add(mean: Tensor, x: Tensor, count: int) -> Tensor:
        return mean * (count / (count + 1)) + torch.norm(x, p=2, dim=1) ** 2 / (count + 1)

    def prune(module: nn.Linear, mean: Tensor) -> None:
        scores = module.weight.abs() * mean.reshape(1, -1).sqrt()
        order = torch.sort(scores, dim=-1, stable=True)[1]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(1, order[:, : int(scores.shape[1] * share)], True)
        module.weight[mask] = 0

    published_walk(model, data, torch.zeros, add, prune)


def published_sparsegpt(model: Llama, data: DataBundle, share: float) -> None:
    def add(gram: Tensor, x: Tensor, count: int) -> Tensor:
        x = (2 / (count + 1)) ** 0.5 * x
        return gram * (count / (count + 1)) + x @ x.T

    def prune(module: nn.Linear, gram: Tensor) -> None:
        module.weight.copy_(published_columns(module.weight.float(), inverse_factor(gram, 0.01).upper, share))

    published_walk(model, data, lambda n: torch.zeros(n, n), add, prune)


def published_columns(weight: Tensor, upper: Tensor, share: float, width: int = 128) -> Tensor:
    """One column after the other, in the orientation of the layer."""
    weight = weight.clone()
    losses = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        block, inverse = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        saliency = block**2 / inverse.diagonal().reshape(1, -1) ** 2
        mask = saliency <= saliency.flatten().sort()[0][int(saliency.numel() * share) - 1]
        for j in range(stop - start):
            w, d = block[:, j], inverse[j, j]
            q = w.clone()
            q[mask[:, j]] = 0
            kept[:, j] = q
            losses[:, start + j] = (w - q) ** 2 / d**2
            error = (w - q) / d
            block[:, j:] -= error.unsqueeze(1).matmul(inverse[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:stop] = kept
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return weight


def loop_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """One selection a group of columns."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], pattern.of):
        chosen = torch.topk(scores[:, start : start + pattern.of], pattern.zeros, dim=1, largest=False)[1]
        mask.scatter_(1, start + chosen, True)
    return mask


def ours(method: WeightSparsity, model: Llama, data: DataBundle) -> Llama:
    with tempfile.TemporaryDirectory() as folder:
        found = rewritten(method, model, data, Scratch(Path(folder) / "weights.partial"))
    return written(model, found.tensors)


def in_place(model: Llama, work: Callable[[Llama], None]) -> Llama:
    copy = model.copy()
    work(copy)
    return copy


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def zeros(model: Llama) -> Iterator[Tensor]:
    for name in model.blocks():
        for module in model.network.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                yield module.weight == 0


def agreement(first: Llama, second: Llama) -> float:
    """Share of the weights that are zero in both or in neither."""
    pairs = [(int((a == b).sum()), a.numel()) for a, b in zip(zeros(first), zeros(second), strict=True)]
    return sum(same for same, _ in pairs) / sum(count for _, count in pairs)


def compare(name: str, loop: Callable[[], Any], mine: Callable[[], Any], same: Callable[[Any, Any], float],
            device: str, repeats: int) -> None:  # fmt: skip
    times: tuple[list[float], list[float]] = ([], [])
    found: list[Any] = [None, None]
    for _ in range(repeats):
        for side, work in enumerate((loop, mine)):
            spent, found[side] = seconds(work, device)
            times[side].append(spent)
    slow, fast = map(min, times)
    print(f"| {name} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} | {same(*found):.4%} |", flush=True)


def equal_masks(first: Tensor, second: Tensor) -> float:
    return float(((first == 0) == (second == 0)).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--schedule", default="block_sequential", help="of our side")
    parser.add_argument("--offload", action="store_true", help="keep only the current block on the device")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    shape, device = SHAPES[arguments.shape], arguments.device
    model, data = random_llama(shape, getattr(torch, arguments.dtype), device), calibration(shape)
    settings: dict[str, Any] = {"schedule": arguments.schedule, "offload": arguments.offload}
    print(
        f"{arguments.shape}: {shape}, {arguments.dtype}, {device}, {torch.get_num_threads()} CPU threads, {settings}\n"
    )
    print("| what | published loop, s | ours, s | ratio | equal masks |\n|---|--:|--:|--:|--:|")
    weight = linear_of(model.network, f"{model.blocks()[0]}.mlp.down_proj").weight.detach()
    with torch.no_grad():
        scores, repeats = torch.rand(2048, 8192, device=device), arguments.repeats
        for zero, of in ((2, 4), (4, 8)):
            pattern = Pattern(zero, of)
            compare(
                f"{zero}:{of}, one matrix of 2048 x 8192", lambda p=pattern: ~loop_pattern(scores, p),
                lambda p=pattern: ~pattern_mask(scores, p), equal_masks, device, repeats + 1,
            )  # fmt: skip
        compare(
            "Wanda 50%, model", lambda: in_place(model, lambda m: published_wanda(m, data, 0.5)),
            lambda: ours(Wanda(**settings), model, data), agreement, device, repeats,
        )  # fmt: skip
        gram = Gram()
        gram.add(torch.randn(2 * weight.shape[1], weight.shape[1], device=device), 1)
        factor = inverse_factor(gram.gram(), 0.01)
        compare(
            "SparseGPT 50%, one matrix", lambda: published_columns(weight.float(), factor.upper, 0.5),
            lambda: sparsegpt([weight], factor, [0.5])[0].weight, equal_masks, device, repeats,
        )  # fmt: skip
        compare(
            "SparseGPT 50%, model", lambda: in_place(model, lambda m: published_sparsegpt(m, data, 0.5)),
            lambda: ours(SparseGPT(**settings), model, data), agreement, device, repeats,
        )  # fmt: skip
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours(Wanda(**settings), model, data)
        print(f"\nPeak device memory of ours, Wanda: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB.")


if __name__ == "__main__":
    main()
