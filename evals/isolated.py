"""Measuring one model in a fresh process: it is saved, loaded there by its manifest, and run on the same samples.

python -m evals.isolated <folder with job.json, batch.safetensors and model/>
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evals.base import Subject
from evals.process_memory import reset_resident_peak, resident_bytes, resident_peak
from evals.timing import Protocol, time_interleaved
from evals.timing_statistics import Timings
from utils.errors import InputError

ROOT = Path(__file__).parent.parent
PATIENCE_S = 3600
Answer = dict[str, Any]


def isolated_timings(subject: Subject, batch: int, protocol: Protocol, compiled: bool) -> Timings | str:
    """Times of one model in a fresh process, or why there are none."""
    found = in_fresh_process(subject, batch, {"task": "time", "protocol": asdict(protocol), "compiled": compiled})
    if "reason" in found:
        return found["reason"]
    return Timings(**(found["timings"] | {"blocks_ms": [tuple(slots) for slots in found["timings"]["blocks_ms"]]}))


def in_fresh_process(subject: Subject, batch: int, job: Mapping[str, Any]) -> Answer:
    """Save a model and its samples, run a job on them in a fresh process, and take its answer.

    The answer holds `reason` where the process could not do it.
    """
    from models.checkpoint import save_model

    model = subject.model
    settings = {"device": str(model.device), "threads": torch.get_num_threads(), "batch": batch, **job}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder / "model")
        placed = subject.batch_of(batch)
        save_file({name: tensor.cpu().contiguous() for name, tensor in placed.items()}, folder / "batch.safetensors")
        (folder / "job.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "evals.isolated", str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, env=_environment(), check=False
        )
        if not (folder / "answer.json").is_file():
            last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
            return {"reason": f"the fresh process failed: {last}"}
        answer = json.loads((folder / "answer.json").read_text())
    return _same_answers(answer, subject, placed)


def _environment() -> dict[str, str]:
    """This process's, with its import paths, so that a model from outside the repository loads as well."""
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _same_answers(answer: Answer, subject: Subject, placed: Mapping[str, torch.Tensor]) -> Answer:
    """Refuse the figures of a process whose model answered otherwise than the one that was scored."""
    if "reason" in answer:
        return answer
    with torch.inference_mode():
        wanted = subject.model.logits(dict(placed)).float().flatten()[: len(answer["logits"])].cpu()
    if not torch.allclose(torch.tensor(answer["logits"]), wanted, rtol=1e-2, atol=1e-3):
        return {"reason": "the model in the fresh process gave other answers than the one that was scored"}
    return answer


def main(folder: Path) -> None:
    """Do the job that lies in a folder, in this process."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    before = resident_bytes()
    try:
        answer = _done(folder, job, before)
    except InputError as error:
        answer = {"reason": f"the fresh process could not load the model: {error}"}
    except Exception as error:
        from utils.memory import out_of_memory

        if not out_of_memory(error):
            raise
        answer = {"reason": f"out of memory at batch {job['batch']}"}
    (folder / "answer.json").write_text(json.dumps(answer))


def _done(folder: Path, job: Mapping[str, Any], before: int | None) -> Answer:
    from evals.harness import call_of, compile_seconds
    from models.checkpoint import load_model

    model = load_model(folder / "model")
    model.network.to(torch.device(job["device"]))
    placed = model.place(load_file(folder / "batch.safetensors"))
    loaded = resident_bytes()
    call = call_of(model.logits, placed, job.get("compiled", False))
    with torch.inference_mode():
        answer: Answer = (
            {"logits": model.logits(placed).float().flatten()[:1000].tolist()} if job["task"] == "time" else {}
        )
        if job["task"] == "time":
            compiling = compile_seconds(call) if job.get("compiled") else None
            (timing,) = time_interleaved([call], model.device, Protocol(**job["protocol"]))
            return answer | {"timings": vars(replace(timing, compile_s=compiling))}
        exact = reset_resident_peak()
        logits = model.logits(placed)
    peak = resident_peak()
    return {
        "logits": logits.float().flatten()[:1000].tolist(), "before": before, "loaded": loaded, "peak": peak,
        "peak_of_pass_alone": exact,
    }  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
