"""Where a pass spends its time: torch's profiler, by operator and by kind of operator, with a trace to look into."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from evals.base import Measurement, Measurements, Subject
from utils.memory import out_of_memory
from utils.rules import Count, check_fields

# the first kind whose part of a name is found in an operator's name takes it
KINDS = (
    ("attention", ("attention", "flash", "fmha", "sdpa")),
    ("convolution", ("conv",)),
    ("matrix product", ("mm", "linear", "gemm", "matmul", "bmm", "einsum", "cutlass")),
    ("norm", ("norm",)),
    ("softmax", ("softmax",)),
    ("activation", ("gelu", "relu", "silu", "tanh", "sigmoid", "erf")),
    ("embedding", ("embedding", "index", "gather", "scatter")),
    ("copy and shape", (
        "copy", "cat", "to", "contiguous", "clone", "view", "reshape", "permute", "transpose", "slice", "select",
        "expand", "as_strided", "empty", "unbind", "chunk", "split", "memcpy", "memset", "fill", "zero", "pad", "stack",
    )),
    ("sum and product", ("add", "mul", "sub", "div", "sum", "mean", "pow", "sqrt", "exp", "elementwise", "reduce")),
)  # fmt: skip

WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Milliseconds that one pass spends in operators, by torch's profiler; itself slower than an unwatched pass.

    The table of the operators that take most, and a trace for chrome://tracing or ui.perfetto.dev, lie beside the
    record; time by kind of operator stands in the report, dense beside pruned.

    Attributes:
        batch: Samples per pass.
        passes: Passes that are averaged.
        rows: Operators to list.
    """

    batch: Count = 8
    passes: Count = 5
    rows: Count = 15

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Profile each model by itself."""
        return [{"profile": self._profiled(subject)} for subject in subjects]

    def _profiled(self, subject: Subject) -> Measurement:
        device = subject.model.device
        try:
            placed = subject.batch_of(self.batch)
            events, trace = profiled(lambda: subject.model.logits(placed), self.passes, device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Measurement(None, "ms", f"out of memory at batch {self.batch}")
        rows = operators(events, self.passes, device.type)
        rows.sort(key=lambda row: -row["ms"])
        details: dict[str, Any] = {
            "batch": self.batch, "passes": self.passes, "sorted_by": "device" if device.type == "cuda" else "CPU",
            "kinds": by_kind(rows), "operators": rows[: self.rows],
        }  # fmt: skip
        table = operator_table(rows[: 4 * self.rows])
        return Measurement(
            sum(row["ms"] for row in rows), "ms", details=details,
            files={"trace.json": trace, "operators.txt": table.encode()},
        )  # fmt: skip


def profiled(run: Callable[[], object], passes: int, device: torch.device) -> tuple[Iterable[Any], bytes]:
    """Averages of every operator over some passes after the first ones, and the trace of all of them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.inference_mode():
        for _ in range(WARMUP):
            run()
        with profile(activities=activities, profile_memory=True) as profiler:
            for _ in range(passes):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    # names the machine's files, which are nobody's business in a report
    trace.pop("traceName", None)
    return profiler.key_averages(), json.dumps(trace, separators=(",", ":")).encode()


def operators(events: Iterable[Any], passes: int, device: str) -> list[dict[str, Any]]:
    """One row an operator, for one pass: calls, ms of its own on the device and on the CPU, bytes it allocated."""
    rows = []
    for event in events:
        cpu, other = event.self_cpu_time_total / 1000, getattr(event, "self_device_time_total", 0.0) / 1000
        on_device = other if device == "cuda" else cpu
        if on_device > 0 and not str(event.key).startswith(("ProfilerStep", "[", "Activity Buffer", "cudaDevice")):
            memory = event.self_device_memory_usage if device == "cuda" else event.self_cpu_memory_usage
            rows.append(
                {
                    "name": str(event.key), "calls": event.count // passes or 1, "ms": on_device / passes,
                    "cpu_ms": cpu / passes, "bytes": int(memory / passes),
                }
            )  # fmt: skip
    return rows


def by_kind(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by kind of operator, the kinds always in one order."""
    sums = dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for row in rows:
        sums[kind_of(row["name"])] += row["ms"]
    return {kind: ms for kind, ms in sums.items() if ms > 0}


def kind_of(name: str) -> str:
    """What kind of work an operator does, by its name."""
    short = name.lower().removeprefix("aten::")
    return next((kind for kind, parts in KINDS if any(_holds(short, part) for part in parts)), "other")


def _holds(name: str, part: str) -> bool:
    """Whether a name holds a part; a short one must be a word of its own, or begin it (`to`, `mm`)."""
    if len(part) > 3:
        return part in name
    words = name.replace("_", " ").replace("::", " ").split()
    return any(word == part or word.startswith(part) and part != "to" or word.endswith(part) for word in words)


def operator_table(rows: Sequence[dict[str, Any]]) -> str:
    """Operators of one model as text in fixed width."""
    width = min(80, max((len(row["name"]) for row in rows), default=8))
    lines = [f"{'operator':{width}}  {'calls':>6}  {'ms':>9}  {'CPU ms':>9}  {'kilobytes':>10}"]
    lines += [
        f"{row['name'][:width]:{width}}  {row['calls']:>6}  {row['ms']:>9.3f}  {row['cpu_ms']:>9.3f}  "
        f"{row['bytes'] / 1000:>10.1f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
