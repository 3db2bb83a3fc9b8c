"""Peak memory of one forward pass: weights plus the most that activations take at once."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from evals.base import Measurement, Measurements, Subject
from evals.harness import batches_of
from evals.isolated import in_fresh_process
from utils.memory import out_of_memory
from utils.rules import Count, check_fields

HOW = {
    "cuda": "weights plus the peak of torch's CUDA allocator over one pass, its statistics reset just before",
    "cpu": "weights plus the peak of all allocations of torch's CPU allocator over one pass, as its profiler sees them",
}


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of tensors alive at the worst moment of a forward pass.

    On CUDA by the allocator's peak statistics, on a CPU by the allocations that torch's
    profiler sees; both without the memory of Python and of libraries.

    Attributes:
        batch: Samples per pass; `auto`: the saturating batch. One sample is measured beside it.
        resident: On a CPU also the peak of the memory that the system gives to a fresh process, split into
            libraries, weights and the pass.
        largest: Batch at which the search for a saturating one ends.
    """

    batch: Count | Literal["auto"] = 64
    resident: bool = False
    largest: Count = 1024

    # what it can't measure of a model that is not on the device as a whole, with its unit
    resident_only: ClassVar[Mapping[str, str]] = {"peak_memory": "byte"}

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Measure each model by itself."""
        batches = batches_of(self.batch, subjects, self.largest, compiled=False)
        return [{"peak_memory": self._peak(s, batches.details(number))} for number, s in enumerate(subjects)]

    def _peak(self, subject: Subject, details: dict[str, Any]) -> Measurement:
        weights = weight_bytes(subject)
        kind, batch = subject.model.device.type, details["batch"]
        try:
            single, peak = (_activations(subject, size) for size in (1, batch))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Measurement(None, "byte", f"out of memory at batch {batch}", {"weights": weights, **details})
        activations = peak.pop("activations")
        details = {"weights": weights, "activations": activations, **details, **peak}
        if single["activations"] is not None:
            details["at_batch_1"] = weights + single["activations"]
        if self.resident and kind == "cpu":
            details["resident"] = resident_of(subject, batch)
        if activations is None:
            return Measurement(None, "byte", reason="the profiler reported no allocation", details=details)
        return Measurement(weights + activations, "byte", details=details, how=HOW[kind])


def weight_bytes(subject: Subject) -> int:
    """Bytes of all parameters and buffers; what several names share counts once."""
    state = {t.data_ptr(): t for t in [*subject.model.network.parameters(), *subject.model.network.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _activations(subject: Subject, size: int) -> dict[str, Any]:
    """What one pass holds at once beyond what was there; on CUDA also what the allocator reserved."""
    batch = subject.batch_of(size)

    def run() -> None:
        with torch.inference_mode():
            subject.model.logits(batch)

    run()
    if subject.model.device.type != "cuda":
        return {"activations": peak_on_cpu(run)}
    torch.cuda.empty_cache()  # what earlier work reserved is not this pass's
    activations = peak_on_cuda(run)
    return {
        "activations": activations,
        "allocated_in_all": torch.cuda.max_memory_allocated(),
        "reserved_in_all": torch.cuda.max_memory_reserved(),
    }


def resident_of(subject: Subject, batch: int) -> dict[str, Any]:
    """Peak of the resident set of a fresh process that loads the model and runs one pass, in bytes.

    `libraries` were there before the model, `weights` came with it, `pass` is what the pass added at its peak.
    """
    found = in_fresh_process(subject, batch, {"task": "memory"})
    if "reason" not in found and None in (found["before"], found["loaded"], found["peak"]):
        found = {"reason": "the system does not tell what a process holds"}
    if "reason" in found:
        return {"peak": None, "reason": found["reason"]}
    before, loaded, peak = (int(found[name]) for name in ("before", "loaded", "peak"))
    parts = {"libraries": before, "weights": loaded - before, "pass": max(0, peak - loaded)}
    return {"peak": peak, **parts, "reset_before_pass": found["peak_of_pass_alone"]}


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
