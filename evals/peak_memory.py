"""Peak memory of one forward pass: weights plus the most that activations take at once."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from evals.base import Measurement, Measurements, Subject
from utils.rules import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of tensors alive at the worst moment of a forward pass.

    On CUDA by the allocator's peak statistics, on a CPU by the allocations that torch's
    profiler sees; both without the memory of Python and of libraries.

    Attributes:
        batch: Samples per pass.
    """

    batch: Count = 64

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model by itself."""
        return [{"peak_memory": self._peak(subject)} for subject in subjects]

    def _peak(self, subject: Subject) -> Measurement:
        state = {t.data_ptr(): t for t in [*subject.model.network.parameters(), *subject.model.network.buffers()]}
        weights = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        batch = subject.batch_of(self.batch)

        def run() -> None:
            with torch.inference_mode():
                subject.model.logits(batch)

        run()
        on_gpu = subject.model.device.type == "cuda"
        activations = peak_on_cuda(run) if on_gpu else peak_on_cpu(run)
        details = {"weights": weights, "activations": activations, "batch": self.batch}
        if activations is None:
            return Measurement(None, "byte", reason="the profiler reported no allocation", details=details)
        return Measurement(weights + activations, "byte", details=details)


def peak_on_cuda(run: Callable[[], object]) -> int:
    """Most bytes that a function holds at once beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(run: Callable[[], object]) -> int | None:
    """Most bytes that a function holds at once, from every allocation torch's CPU allocator makes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held, peak = 0, None
    for *_, change in changes:
        held += change
        peak = max(held, peak or 0)
    return peak
