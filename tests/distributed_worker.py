"""What each process of test_distributed.py does: every case alone, then together with the others, then what fails.

python -m torch.distributed.run --standalone --nproc_per_node=3 -m tests.distributed_worker <folder>
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.base import DataBundle, TensorBatches
from evals.accuracy import Accuracy
from evals.evaluate import evaluate
from evals.latency import Latency
from evals.loss import Loss
from evals.perplexity import Perplexity
from models.base import PrunableModel
from models.pretrained import validate
from prune.depth.stream import angular_distances, block_influence
from prune.gates import gate_gradients
from prune.optin.exact import exact_losses
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings
from prune.rankers.fisher import Fisher
from prune.rankers.optin import Optin
from prune.rankers.taylor import absolute_sums
from prune.ranking import ranked
from prune.recovery.base import TrainedRecovery
from prune.recovery.distill import Distill
from prune.recovery.finetune import Finetune
from prune.recovery.lora import Lora
from prune.sensitivity.method import Sensitivity
from prune.surgery import cut
from prune.weights.matrices import prunable_matrices
from prune.weights.sparsegpt import SparseGPT
from prune.weights.wanda import Wanda
from prune.whole.rows import row_gradients
from prune.whole.scores import weight_scores
from prune.width.neurons import given_norms, neuron_groups
from tests.adapters import ADAPTERS, bundle_of
from tests.test_contract import random_plan
from tests.test_perplexity import TEXTS, bundle, reader
from utils.distributed import described, divided, from_first, gathered, is_first, rank, summed, world_size
from utils.errors import InputError
from utils.joining import joined
from utils.launched import launched
from utils.storage import Artifact, Store

Found = dict[str, Any]
ADAPTIVE: dict[str, Any] = {"epochs": 3, "learning_rate": 0.01}
STEADY: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "learning_rate": 0.05, "average": 0.5}


def sample(name: str, batches: int = 4, batch_size: int = 4) -> tuple[PrunableModel, DataBundle]:
    """A small model and six samples: four calibration batches, and a tail of two in training and validation."""
    model, samples = ADAPTERS[name]()
    split = TensorBatches(samples, batch_size)
    return model, replace(bundle_of(samples, batches), validation=split, train=TensorBatches(samples, batch_size, 0))


def nested(found: Mapping[str, Mapping[str, Tensor]]) -> Found:
    return {f"{a}/{b}": tensor for a, inner in found.items() for b, tensor in inner.items()}


def gradients(folder: Path) -> Found:
    model, data = sample("deit")
    matrices = prunable_matrices(model)
    found: Found = {"gates": gate_gradients(model, data, ""), "absolute": absolute_sums(model, data)}
    found["rows"] = row_gradients(model, data, matrices)
    return nested(found | {"weights": weight_scores(model, data, matrices, "taylor")})


def exact(name: str, batches: int, folder: Path) -> Found:
    model, data = sample(name, batches)
    # stacks of a few candidates, so that each process has some of a group
    settings = Settings(memory_gb=2e-4)
    return nested(exact_losses(model, data, settings, kinds=["head", "neuron", *(["token"] if name == "deit" else [])]))


def sketch(name: str, folder: Path) -> Found:
    model, data = sample(name, 2)
    return nested(sketched_losses(model, data, Settings(), 5))


def compat(folder: Path) -> Found:
    model, data = sample("bert")
    return nested(ranked(Optin(mode="compat"), model, data, Store(folder / "compat")).scores.terms)


def activations(folder: Path) -> Found:
    model, data = sample("llama")
    found: Found = {"influence": block_influence(model, data)}
    found |= {f"angle{size}": values for size, values in angular_distances(model, data).items()}
    return found | given_norms(model, data, neuron_groups(model))


def sensitivity(folder: Path) -> Found:
    model, data = sample("deit")
    found = ranked(Sensitivity(grid=(0.25, 0.5), samples=None), model, data, Store(folder / "sensitivity")).scores
    rows = [row["loss_change"] for row in found.facts["rows"]]
    return {**nested(found.terms), "rows": torch.tensor(rows, dtype=torch.float64)}


def sparse(method: Any, folder: Path) -> Found:
    model, data = sample("llama")
    store = Store(folder / method.name)
    from prune.base import Plan

    done = method.apply_on(model, Plan((), budget="weights", ratio_asked=0.5), data, store)
    return dict(done.model.network.state_dict())


def answers(folder: Path) -> Found:
    """Six batches, two (fewer than processes), and a language model's chunks."""
    found: Found = {}
    for size in (1, 4):
        model, data = sample("deit", batch_size=size)
        found[f"validate{size}"] = validate(model, data)
        (measured,) = zip(
            *evaluate([model], data, {"a": Accuracy(), "l": Loss()}, Store(folder / "answers")), strict=True
        )
        found[f"figures{size}"] = {name: m.value for of in measured for name, m in of.items()}
    model = reader()
    metrics = {"p": Perplexity(length=8, batch=2)}
    (((m,),),) = [[list(of.values()) for of in found] for found in evaluate([model], bundle(model, TEXTS), metrics)]
    return found | {"perplexity": m.value}


def timed(folder: Path) -> Found:
    """A metric that reads a clock, and what says who measured it."""
    model, data = sample("deit")
    metric = Latency(seconds=0.01, warmup=1)
    (found,) = evaluate([model, model], data, {"latency": metric})
    values = [m.get("latency") for m in found]
    return {"measured": [m is not None and m.value is not None for m in values] == [is_first()] * 2}


def recovered(way: Callable[[], TrainedRecovery], name: str, folder: Path) -> Found:
    """What a recovery ends with: weights, losses, right answers."""
    model, data = sample(name)
    recovery = way()
    if world_size() == 1:
        recovery = replace(recovery, sharded=False)
    kind = f"{type(recovery).__name__}{way().sharded}{name}"
    pruned = cut(model, random_plan(model, 0))
    done = recovery.recover(pruned, model, data, Store(folder / kind), seed=0)
    losses = [row["train_loss"] for row in done.history[1:]]
    metrics = {"a": Accuracy(), "l": Loss()} if name == "deit" else {}
    (measured,) = zip(*evaluate([done.model], data, metrics), strict=True) if metrics else ((),)
    figures = {n: m.value for of in measured for n, m in of.items()}
    numbers = torch.tensor([*losses, figures.get("loss", 0.0)], dtype=torch.float64)
    return {**done.model.network.state_dict(), "losses": numbers, "right": figures.get("accuracy")}


def but_for_keys(found: Found) -> Found:
    """Without the biases of attention's keys: softmax makes their gradients zero, so that only rounding moves them."""
    return {name: value for name, value in found.items() if not name.endswith("qkv.bias")}


def masked_shards(folder: Path) -> Found:
    """Zeros stay where weights are divided."""
    model, data = sample("llama")
    pruned = model.copy()
    for matrix in prunable_matrices(model):
        pruned.network.get_parameter(f"{matrix.name}.weight").data[:, ::2] = 0
    recovery = Finetune(**STEADY, sharded=world_size() > 1)
    done = recovery.recover(pruned, model, data, Store(folder / "masked"), seed=0)
    weights = dict(done.model.network.state_dict())
    zeros = sum(int((weights[f"{m.name}.weight"][:, ::2] != 0).sum()) for m in prunable_matrices(model))
    return {**weights, "moved": zeros}


class Stopping(TensorBatches):
    """Training data whose third epoch never comes."""

    def set_epoch(self, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        super().set_epoch(epoch)


def resumed(sharded: bool, folder: Path) -> Found:
    """Stopped after two epochs and gone on with, against a run that was not."""
    model, data = sample("llama")
    recovery = Finetune(epochs=4, learning_rate=1e-2, sharded=sharded and world_size() > 1)
    pruned, where = cut(model, random_plan(model, 0)), Store(folder / f"resumed{sharded}")
    stopping = Stopping(data.train.tensors, 4, 0)  # type: ignore[attr-defined]
    try:
        recovery.recover(pruned, model, replace(data, train=stopping), where, seed=0)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("it was not stopped")
    again = recovery.recover(pruned, model, data, where, seed=0).model.network.state_dict()
    through = recovery.recover(pruned, model, data, Store(folder / f"through{sharded}"), seed=0).model.network
    return {"same": all(torch.equal(again[name], tensor) for name, tensor in through.state_dict().items())}


def stored(folder: Path) -> Found:
    """All compute together once; then it is there."""
    model, data = sample("toy_images")
    store, calls = Store(folder / "stored"), []
    first = ranked(Fisher(), model, data, store)

    def compute(scratch: Any) -> Artifact:
        calls.append(1)
        return Artifact({"rank": torch.tensor(rank())}, {"by": rank()})

    alone = store.fetch("x", "by_first", {"a": 1}, compute, by_first=True)
    hits = [first.hit, ranked(Fisher(), model, data, store).hit, alone.hit]
    rows = [fact for _, fact in divided(range(7), lambda item: ({}, item), in_rounds=True)]
    own = int(summed({"n": torch.tensor(len(calls))})["n"])
    return {"hits": hits, "by": alone.artifact.facts["by"], "rows": rows, "calls": own}


CASES: dict[str, Callable[[Path], Found]] = {
    "gradients": gradients,
    "exact_deit": lambda folder: exact("deit", 3, folder),
    "exact_llama_one_batch": lambda folder: exact("llama", 1, folder),
    "compat": compat,
    "sketch_deit": lambda folder: sketch("deit", folder),
    "sketch_llama": lambda folder: sketch("llama", folder),
    "activations": activations,
    "sensitivity": sensitivity,
    "wanda": lambda folder: sparse(Wanda(), folder),
    "sparsegpt": lambda folder: sparse(SparseGPT(), folder),
    "answers": answers,
    "timed": timed,
    "stored": stored,
    "finetune": lambda folder: recovered(lambda: Finetune(**STEADY), "deit", folder),
    "finetune_llama": lambda folder: recovered(lambda: Finetune(**STEADY), "llama", folder),
    "distill": lambda folder: recovered(lambda: Distill(**STEADY), "llama", folder),
    "distill_features": lambda folder: recovered(lambda: Distill(**STEADY, features=1.0), "deit", folder),
    "batch_norm": lambda folder: recovered(lambda: Finetune(**STEADY), "resnet_basic", folder),
    "sharded_llama": lambda folder: recovered(lambda: Finetune(**STEADY, sharded=True), "llama", folder),
    "sharded_checkpointed": lambda folder: recovered(
        lambda: Finetune(**STEADY, sharded=True, grad_checkpointing=True), "llama", folder
    ),
    "masked_shards": masked_shards,
    "lora": lambda folder: recovered(lambda: Lora(**STEADY), "deit", folder),
    "lora_llama": lambda folder: recovered(lambda: Lora(**STEADY), "llama", folder),
    "lora_adamw": lambda folder: but_for_keys(recovered(lambda: Lora(**ADAPTIVE), "deit", folder)),
    "adamw": lambda folder: but_for_keys(recovered(lambda: Finetune(**ADAPTIVE), "deit", folder)),
    "resumed": lambda folder: resumed(False, folder),
    "resumed_shards": lambda folder: resumed(True, folder),
}


def one_refuses() -> None:
    if rank() == 1:
        raise InputError("data.root=/nowhere: must be a folder")
    gathered(({}, None))


def one_breaks() -> None:
    if rank() == 2:
        raise ValueError("unforeseen")
    from_first(lambda: ({}, None))
    gathered(({}, None))


def all_refuse() -> None:
    raise InputError("prune.ratio=0.99: too much")


def first_is_interrupted() -> None:
    if is_first():
        raise KeyboardInterrupt
    gathered(({}, None))


def one_is_terminated() -> None:
    """As a launcher does to those that are left."""
    if rank() == 1:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(30)
    gathered(({}, None))


FAILING = [one_refuses, one_breaks, all_refuse, first_is_interrupted, one_is_terminated]


def difference(one: Any, other: Any) -> float:
    """Largest difference relative to the largest entry; 0 where they are equal to the bit."""
    if not isinstance(one, Tensor):
        return 0.0 if one == other else float("inf")
    if one.shape != other.shape or torch.equal(one, other):
        return 0.0 if one.shape == other.shape else float("inf")
    return float((one.double() - other.double()).abs().max() / one.double().abs().max().clamp_min(1e-30))


def compared(one: Found, other: Found) -> float:
    assert one.keys() == other.keys()
    return max(difference(one[name], other[name]) for name in one)


def main(folder: Path, names: list[str]) -> None:
    place = launched()
    assert place is not None
    cases = {name: case for name, case in CASES.items() if name in names}
    mine = folder / f"alone{place.rank}"
    alone = {name: case(mine) for name, case in cases.items() if name not in ("stored", "timed")}
    found: dict[str, Any] = {}
    with joined("cpu"):
        for name, case in cases.items():
            values = case(folder / "together")
            found[name] = compared(alone[name], values) if name in alone else values
        found["described"] = described()
    ends = []
    for failing in FAILING:
        try:
            with joined("cpu"):
                failing()
            ends.append("nothing")
        except BaseException as error:
            ends.append(f"{type(error).__name__}: {error}")
    (folder / f"found{place.rank}.json").write_text(json.dumps(found | {"ends": ends}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
