"""Token reduction as wall-clock time: dense, padded, packed, and the ancestor's loop, interleaved in one run.

(a) The ancestor's set-up (2 post-norm layers, width 512, batch 16 of 128 tokens, the seeded batch, threshold 13),
with attention over tokens: its per-sample loop, written anew from its description, against batched padding and
packing, on the same weights, inputs and keep decisions. (b) DeiT: EViT at keep 0.7 and ToMe at r = 13 against dense,
eager and compiled, over batches. (c) BERT-base on the lengths of GLUE sentences: packed against padded. (d) Ways to
compute packed attention on a CPU. Outputs are compared before anything is timed. Weights are random.

python -m benchmarks.tokens --parts a c d
python -m benchmarks.tokens --parts b --models deit_small_patch16_224 --batches 1 8 --compiled
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import linear, relu, scaled_dot_product_attention

from evals.timing import Protocol, Timings, speedup, time_interleaved
from models.ancestor_encoder import AncestorNetwork, dropped_as_published
from models.base import Batch, PrunableModel
from models.batch_cost import EncoderShape, executed
from models.bert import bert
from models.cost import cost_model
from models.keeping import Keeping
from models.merging import Reduction
from models.ragged import Packing, kept, pack, packing_of, packing_of_lengths, ragged_attention, segment_mean
from models.vit import vit
from prune.tokens.evit import ClassAttention

DATA = Path(os.environ.get("PARE_DATA", "../shared/data"))
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Encode = Callable[[AncestorNetwork, Tensor, float], Tensor]


def layer_of(layer: nn.TransformerEncoderLayer, x: Tensor, attend: Attend) -> Tensor:
    """One post-norm layer on (..., D); `attend` takes (..., H, dh)."""
    attention = layer.self_attn
    qkv = linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)  # (..., 3*H*dh) -> (..., H, dh)
    x = layer.norm1(x + attention.out_proj(attend(q, k, v).flatten(-2)))
    return layer.norm2(x + layer.linear2(relu(layer.linear1(x), inplace=True)))


def over_tokens(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, T, H, dh) -> (B, H, T, dh)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def dense(network: AncestorNetwork, x: Tensor, threshold: float) -> Tensor:
    for layer in network.layers:
        x = layer_of(layer, x, partial(over_tokens, None))  # type: ignore[arg-type]
    return network.head(x).mean(dim=1)


def ancestor(network: AncestorNetwork, x: Tensor, threshold: float) -> Tensor:
    """The published loop, with attention over tokens; padding is neither masked nor left out of the mean."""
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer in network.layers:
        x, alive = dropped_as_published(x, alive, threshold)
        x = layer_of(layer, x, partial(over_tokens, None))  # type: ignore[arg-type]
    return network.head(x).mean(dim=1)


def padded(network: AncestorNetwork, x: Tensor, threshold: float) -> Tensor:
    alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for layer in network.layers:
        keep = (x.norm(dim=-1) > threshold) & alive
        longest = int(keep.sum(1).max())
        if longest < x.shape[1]:
            order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
            rows = order + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
            x = x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
            keep = keep.gather(1, order)
        alive = keep
        x = layer_of(layer, x, partial(over_tokens, alive[:, None, None]))  # type: ignore[arg-type]
    scores = network.head(x) * alive[..., None]
    return scores.sum(dim=1) / alive.sum(dim=1, keepdim=True)


def packed(network: AncestorNetwork, x: Tensor, threshold: float) -> Tensor:
    packing: Packing | None = None
    for layer in network.layers:
        keep = x.norm(dim=-1) > threshold
        if packing is None:
            packing = packing_of(keep)
            x = pack(x, packing)
        elif not keep.all():
            x, packing = kept(x, packing, keep)
        x = layer_of(layer, x, partial(within_samples, packing))  # type: ignore[arg-type]
    assert packing is not None
    return segment_mean(network.head(x), packing)


def within_samples(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ragged_attention(q, k, v, packing)


def one_by_one(network: AncestorNetwork, x: Tensor, threshold: float) -> Tensor:
    """What is right: every sample alone, without padding."""
    rows = [row[row.norm(dim=-1) > threshold][None] for row in x]
    return torch.cat([dense(network, row, threshold) for row in rows])


def protocol(arguments: argparse.Namespace) -> Protocol:
    return Protocol(warmup=3, blocks=arguments.blocks, seconds=arguments.seconds, least_calls=2 * arguments.blocks)


def median_ms(timing: Timings) -> float:
    return statistics.median(timing.all_ms)


def part_a(arguments: argparse.Namespace) -> None:
    """The ancestor's set-up."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    x = torch.rand(16, 128, 512)
    network = AncestorNetwork(2, 512, 2, 8, 2048, 0.1).eval()
    lengths = (x.norm(dim=-1) > 13.0).sum(1).tolist()
    shape = EncoderShape(512, 2048, 2, 2)
    with torch.inference_mode():
        right = one_by_one(network, x, 13.0)
        for path in (padded, packed):
            assert (path(network, x, 13.0) - right).abs().max() <= 1e-5
    ways: list[tuple[str, Encode, tuple[int, int]]] = [
        ("dense", dense, executed(lengths, 128, "mask")),
        ("the ancestor's loop", ancestor, executed(lengths, 128, "pad")),
        ("ours, padded", padded, executed(lengths, 128, "pad")),
        ("ours, packed", packed, executed(lengths, 128, "pack")),
    ]
    network, x = network.to(device), x.to(device)
    timings = time_interleaved([partial(way, network, x, 13.0) for _, way, _ in ways], device, protocol(arguments))
    print("| (a) batch 16 of 128 tokens | ms | time saved | MACs saved | time / MACs saved |\n|---|--:|--:|--:|--:|")
    base = shape.macs(*executed(lengths, 128, "mask"))
    for (name, _, work), timing in zip(ways, timings, strict=True):
        time_saved, macs_saved = 1 - 1 / speedup(timings[0], timing), 1 - shape.macs(*work) / base
        share = f"{time_saved / macs_saved:.2f}" if macs_saved else ""
        print(f"| {name} | {median_ms(timing):.1f} | {time_saved:.1%} | {macs_saved:.1%} | {share} |", flush=True)


def reduced(model: PrunableModel, how: Keeping | Reduction) -> PrunableModel:
    twin = model.copy()
    twin.reduce_tokens(how)
    return twin


def variants(name: str, keep: float) -> dict[str, PrunableModel]:
    torch.manual_seed(0)
    model = vit(name=name)
    evit = Keeping(ClassAttention((keep,) * 3, 1), (3, 6, 9), 12)
    return {
        "dense": model,
        f"EViT, keep {keep:g}": reduced(model, evit),
        "ToMe, r = 13": reduced(model, Reduction((13,) * 12)),
    }


def part_b(arguments: argparse.Namespace) -> None:
    """DeiT, dense against reduced, over batches."""
    device = torch.device(arguments.device)
    print("| (b) model | batch | mode | dense ms | ms | speed-up | by MACs |\n|---|--:|---|--:|--:|--:|--:|")
    for name in arguments.models:
        models = variants(name, arguments.keep)
        example = {"inputs": torch.randn(1, 3, 224, 224)}
        macs = {label: cost_model(model, example).total("macs") for label, model in models.items()}
        for mode in ("eager", "compiled") if arguments.compiled else ("eager",):
            wins: dict[str, list[tuple[int, float]]] = {label: [] for label in models if label != "dense"}
            for size in arguments.batches:
                x = torch.randn(size, 3, 224, 224, device=device)
                networks = [model.network.to(device) for model in models.values()]
                torch._dynamo.reset()  # what was compiled before counts towards a limit, above which code stays eager
                calls = [partial(torch.compile(n, dynamic=False) if mode == "compiled" else n, x) for n in networks]
                timings = time_interleaved(calls, device, protocol(arguments))  # type: ignore[arg-type]
                for label, timing in zip(list(models)[1:], timings[1:], strict=True):
                    faster = speedup(timings[0], timing)
                    wins[label].append((size, faster))
                    row = f"{median_ms(timings[0]):.0f} | {median_ms(timing):.0f} | {faster:.2f}"
                    print(
                        f"| {name}, {label} | {size} | {mode} | {row} | {macs['dense'] / macs[label]:.2f} |", flush=True
                    )
            for label, found in wins.items():
                first = next((size for size, faster in found if faster > 1), None)
                print(f"\n{name}, {label}, {mode}: faster than dense from batch {first or 'none of these'} on.\n")


SENTENCES = {"SST-2": ("SST-2", (0,)), "MRPC": ("MRPC", (3, 4)), "QNLI": ("QNLI", (1, 2))}


def glue_lengths(task: str, count: int) -> Tensor:
    """Tokens of the first sentences or pairs of a task's dev set, special tokens included."""
    folder, columns = SENTENCES[task]
    tokenizer = Tokenizer.from_file(str(DATA / "tokenizers" / "bert-base-uncased" / "tokenizer.json"))
    tokenizer.no_padding()  # the file says up to 256
    tokenizer.no_truncation()
    lines = (DATA / "glue" / folder / "dev.tsv").read_text(encoding="utf-8").splitlines()[1 : count + 1]
    rows = [[line.split("\t")[column] for column in columns] for line in lines]
    ids = [tokenizer.encode_batch([row[i] for row in rows], add_special_tokens=False) for i in range(len(columns))]
    return torch.tensor([1 + sum(1 + len(part.ids) for part in parts) for parts in zip(*ids, strict=True)])


def text_batch(lengths: Tensor) -> Batch:
    """Random ids of these lengths, padded to the longest."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def part_c(arguments: argparse.Namespace) -> None:
    """BERT-base on the lengths of GLUE."""
    torch.manual_seed(0)
    model = bert(classes=2, settings={"model_type": "bert"})
    model.network.to(arguments.device)
    twin = model.copy()
    twin.run_packed()
    found = {task: glue_lengths(task, 512) for task in SENTENCES}
    mixed = torch.cat(list(found.values()))
    found["the three mixed"] = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
    size = arguments.text_batch
    print(f"| (c) batch {size} of | lengths | padding | padded ms | packed ms | speed-up |\n|---|---|--:|--:|--:|--:|")
    for task, lengths in found.items():
        for order in ("natural", "sorted"):
            chosen = lengths.sort().values[len(lengths) // 2 :][:size] if order == "sorted" else lengths[:size]
            batch = text_batch(chosen)
            placed = [m.place(batch) for m in (model, twin)]
            with torch.inference_mode():
                gap = (model.logits(placed[0]) - twin.logits(placed[1])).abs().max()
            assert gap <= 1e-5 or model.device.type != "cpu", f"packed differs by {gap}"
            calls = [partial(m.logits, p) for m, p in zip((model, twin), placed, strict=True)]
            timings = time_interleaved(calls, model.device, protocol(arguments))
            waste = 1 - float(chosen.sum()) / (size * int(chosen.max()))
            row = " | ".join(f"{median_ms(t):.0f}" for t in timings)
            spread = f"{int(chosen.min())}-{int(chosen.max())}"
            print(f"| {task}, {order} | {spread} | {waste:.0%} | {row} | {speedup(*timings):.2f} |", flush=True)


def bucketed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, slack: float = 1.25) -> Tensor:
    """Samples sorted by length, a few batches padded within, a key mask."""
    order = packing.lengths.argsort(descending=True)
    lengths = packing.lengths[order].tolist()
    cuts = [0]
    for i, n in enumerate(lengths):
        if n * slack < lengths[cuts[-1]]:
            cuts.append(i)
    found = torch.empty(*q.shape[:2], v.shape[2])
    for low, high in pairwise([*cuts, len(lengths)]):
        rows, there = order[low:high], torch.arange(lengths[low]) < packing.lengths[order[low:high], None]
        index = packing.first[rows, None] + torch.arange(lengths[low]).minimum(packing.lengths[rows, None] - 1)
        q_rows, k_rows, v_rows = (t[index].transpose(1, 2) for t in (q, k, v))
        mixed = scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=there[:, None, None]).transpose(1, 2)
        found[index[there]] = mixed[there]
    return found


def nested(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    least, most = min(packing.host_lengths), max(packing.host_lengths)
    with torch.inference_mode(False), torch.no_grad():  # they cannot be made in inference mode
        bounds = packing.cu_seqlens.long()
        made = partial(torch.nested.nested_tensor_from_jagged, offsets=bounds, min_seqlen=least, max_seqlen=most)
        q, k, v = (made(t).transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def part_d(arguments: argparse.Namespace) -> None:
    """Packed attention on a CPU, three ways."""
    torch.manual_seed(0)
    draws = {
        "16 of 70-88, 8 heads": (torch.randint(70, 89, (16,)), 8),
        "32 of 5-60, 12 heads": (torch.randint(5, 61, (32,)), 12),
        "8 of 100-197, 6 heads": (torch.randint(100, 198, (8,)), 6),
    }
    print(
        "| (d) samples of tokens | runs of equal length ms | length buckets ms | nested tensors ms |\n|---|--:|--:|--:|"
    )
    for name, (lengths, heads) in draws.items():
        packing = packing_of_lengths(lengths, int(lengths.max()))
        q, k, v = (torch.randn(packing.total, heads, 64) for _ in range(3))
        ways = (ragged_attention, bucketed, nested)
        assert all((way(q, k, v, packing) - ragged_attention(q, k, v, packing)).abs().max() < 1e-5 for way in ways)
        calls = [partial(way, q, k, v, packing) for way in ways]
        times = [median_ms(t) for t in time_interleaved(calls, torch.device("cpu"), protocol(arguments))]
        print(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in times)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices="abcd", default=[*"abcd"])
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224", "deit_tiny_patch16_224"])
    cuda = torch.cuda.is_available()
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128] if cuda else [1, 8])
    parser.add_argument("--keep", type=float, default=0.7, help="share that each of EViT's three blocks keeps in (b)")
    parser.add_argument("--text-batch", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="compiled models as well in (b)")
    parser.add_argument("--seconds", type=float, default=5.0, help="spent on each way, about")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} CPU threads, float32\n")
    run: dict[str, Callable[[argparse.Namespace], None]] = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}
    for part in arguments.parts:
        run[part](arguments)
        print()


if __name__ == "__main__":
    main()
