"""The record of a run, and the files it leaves: result.json and report.md."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.base import DataBundle
from evals.base import Measurements
from evals.class_table import class_block
from evals.notes import timing_notes
from evals.page import page
from evals.phase_energy import PhaseEnergy
from evals.profile_text import profile_blocks
from evals.protocols import differing
from evals.side_files import measured_json, side_files
from evals.table import history_table, how_list, markdown_table, three_columns
from evals.texts import text_blocks
from evals.token_report import kept_tokens
from evals.tracking import Tracker
from evals.values import finite
from models.base import PrunableModel
from models.keeping import Keeping
from prune.base import Plan
from prune.ranking import Ranking
from prune.recovery.base import Recovered
from prune.rewriting import Applied
from utils.errors import RunError
from utils.files import write_atomically
from utils.launched import speaks
from utils.machine import describe_machine, load_watched
from utils.memory import Shortage, described, shortages
from utils.secrets import covered, redacted
from utils.seed import determinism
from utils.storage import key_hash

# what a run did not do wrong
STOPPED: dict[type, str] = {KeyboardInterrupt: "interrupted (Ctrl-C)", SystemExit: "terminated from outside"}
NAMES = {"mlp": "MLP", "attention": "attention"}
PHASES = ("load", "train", "rank", "search", "cut", "recover", "evaluate", "total")
# in the first of all phases the device is not known yet, the last holds all the others
METERED = PHASES[1:-1]


@dataclass
class Record:
    """Everything a run found; filled as the run goes on and written whatever happens."""

    name: str
    config: dict[str, Any]
    seed: int
    versions: dict[str, Any]
    command: str = "python main.py"
    device: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data_parts: dict[str, str] = field(default_factory=dict)
    tracker: Tracker | None = None
    status: str = "failed"
    error: str | None = None
    fingerprints: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(("model", "data", "scores")))
    dense: Measurements = field(default_factory=dict)
    pruned: Measurements = field(default_factory=dict)
    plan: Plan | None = None
    cache: dict[str, Any] = field(default_factory=lambda: {"hit": False, "path": None})
    history: list[dict[str, float]] = field(default_factory=list)
    method: str = ""
    model_name: str = ""
    data_name: str = ""
    saved: str | None = None
    scores_note: str | None = None
    source_notes: Sequence[Sequence[str]] = ()
    recovery: Recovered | None = None
    plots: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    unrecovered: Measurements = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    undetermined: list[str] = field(default_factory=list)
    shortages: list[Shortage] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    joules: PhaseEnergy = field(default_factory=PhaseEnergy)

    @classmethod
    def begin(cls, cfg: DictConfig, versions: dict[str, Any], command: str) -> "Record":
        """Start the record of a run, resolved configuration included."""
        config = covered(OmegaConf.to_container(cfg, resolve=True))
        return cls(cfg.name, config, cfg.seed, versions, redacted(command))

    def note(self, model: PrunableModel, data: DataBundle, ranking: Ranking) -> None:
        """Take in what the scores were made from, and where they lie."""
        self.model_name, self.data_name = model.name, data.name
        self.data_parts = dict(data.fingerprints)
        self.environment = describe_machine(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")}
        self.fingerprints = {"model": model.fingerprint(), "data": data.fingerprint, "scores": ranking.fingerprint}
        self.scores_note = ranking.scores.facts.get("note")
        self.cache = {"hit": ranking.hit, "path": str(ranking.path) if ranking.path else None}

    def note_applied(self, done: Applied) -> None:
        """Take in the plan as it was carried out, and where rewritten weights lie."""
        self.plan = done.plan
        if done.fingerprint is not None:
            self.fingerprints["scores"] = done.fingerprint
            self.cache = {"hit": done.hit, "path": str(done.path)}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall time to one of the record's phases, and its joules where they are known."""
        start = time.perf_counter()
        try:
            with self.joules.phase(name) if name in METERED else nullcontext():
                yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note how busy the machine was during the block, this process and others apart."""
        with load_watched(torch.device(self.device["type"]), self.environment):
            yield

    @contextmanager
    def kept_in(self, out: Path) -> Iterator[None]:
        """Write result.json, report.md and report.html after the block, and tell the tracker; also when it fails."""
        try:
            with self.phase("total"), shortages() as self.shortages:
                yield
            self.status = "ok"
        except BaseException as error:
            self.error = STOPPED.get(type(error)) or redacted(f"{type(error).__name__}: {error}")
            raise
        finally:
            if speaks():
                self._write(out)

    def _draw_profile(self, out: Path) -> None:
        """A picture of where the time went, if that was measured."""
        kinds = {
            name: found["profile"].details.get("kinds", {})
            for name, found in (("dense", self.dense), ("pruned", self.pruned))
            if "profile" in found
        }
        if any(kinds.values()):
            from evals.plots import save_figure, time_by_kind

            (out / "plots").mkdir(exist_ok=True)
            save_figure(time_by_kind(kinds, "where one pass spends its time"), out / "plots" / "time_by_kind.png")
            self.plots = [*self.plots, "plots/time_by_kind.png"]

    def _write(self, out: Path) -> None:
        self._draw_profile(out)
        for name, content in [*side_files("dense", self.dense), *side_files("pruned", self.pruned)]:
            write_atomically(out / name, content)
        result = covered(finite(self.to_json()))
        write_atomically(out / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
        write_atomically(out / "report.md", redacted(self.to_markdown()).encode(), synced=False)
        pictures = {picture: (out / picture).read_bytes() for picture in self.pictures}
        shown = page(self.name, {self.name: result}, pictures=pictures)
        write_atomically(out / "report.html", shown.encode(), synced=False)
        if self.tracker is not None:
            self.tracker.log(result, out)

    def add(self, found: Sequence[Measurements]) -> None:
        """Take in one metric's measurements of the dense and the pruned model (or of one for both).

        Raises:
            RunError: If the two were taken by different protocols, or on different tokens.
        """
        for name in found[0].keys() & found[-1].keys():
            if reason := differing(found[0][name].details, found[-1][name].details):
                raise RunError(f"{name}: dense and pruned don't compare: {reason}")
        self.dense |= found[0]
        self.pruned |= found[-1]
        if len(found) > 2:
            self.unrecovered |= found[1]

    def keep(self, out: Path, plan: Plan) -> None:
        """Take in a plan, and write it down."""
        self.plan = plan
        if speaks():
            plan.save(out / "plan.json")

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        trained = self.recovery if self.recovery and self.recovery.history else None
        return {
            "name": self.name,
            "status": self.status,
            "error": self.error,
            "command": self.command,
            "config": self.config,
            "fingerprints": self.fingerprints,
            "versions": self.versions,
            "device": self.device,
            "environment": self.environment,
            "determinism": determinism(
                bool(self.config.get("deterministic")), str(self.device.get("type", "")), self.undetermined
            ),
            "config_hash": config_hash(self.config),
            "model": self.model_name,
            "data": {"name": self.data_name, "fingerprints": self.data_parts},
            "seed": self.seed,
            "dense": measured_json("dense", self.dense),
            "pruned": measured_json("pruned", self.pruned),
            **({"unrecovered": measured_json("unrecovered", self.unrecovered)} if self.unrecovered else {}),
            "plan": self.plan.summary() if self.plan else None,
            "scores": self.scores,
            "cache": self.cache,
            "method": self.method,
            "history": self.history,
            "recovery": {**trained.facts, "history": with_seconds(trained)} if trained else None,
            "saved": self.saved,
            "out_of_memory": [asdict(found) for found in self.shortages],
            "seconds": self.seconds,
            "joules": self.joules.to_json(METERED),
            "warnings": self.warnings(),
        }

    def scores_from(self) -> str:
        """Where the scores came from, in words."""
        if self.cache["path"] is None:
            return "no scores were needed"
        what = "pruned weights" if self.plan and self.plan.matrices else "scores"
        return f"{what} from the cache" if self.cache["hit"] else f"{what} computed"

    def warnings(self) -> list[str]:
        """What a reader should know before the numbers."""
        notes = [note for source in self.source_notes for note in source]
        notes += [self.scores_note] if self.scores_note else []
        notes += self.plan.details.get("notes", []) if self.plan else []
        notes += self.recovery.notes if self.recovery else []
        notes += map(described, self.shortages)
        if self.status != "ok":
            notes.append(f"The run failed: {self.error}")
        if self.plan and self.plan.budget and self.plan.is_identity:
            notes.append("The plan keeps everything: dense and pruned are the same function.")
        if self.status == "ok" and not self.dense:
            notes.append("No metric was selected (evals): nothing was measured.")
        sparse = bool(self.plan and self.plan.matrices)  # such a plan says by itself what zeros are worth
        timed = any(name.startswith(("latency", "throughput", "decode")) for name in self.pruned)
        if "macs" in self.pruned and not timed and not sparse:
            notes.append("Latency was not measured: fewer MACs are no speed-up by themselves.")
        gain = self.pruned["latency"].details.get("speedup") if "latency" in self.pruned else None
        if gain is not None and gain < 1 and self.plan and not self.plan.is_identity:
            notes.append(f"The pruned model was not faster: {gain:.2f}x the speed of the dense one at this batch.")
        for side, found in (("dense", self.dense), ("pruned", self.pruned)):
            if (accuracy := found.get("accuracy")) and accuracy.value is not None:
                chance, error = (accuracy.details.get(key, 0.0) for key in ("chance", "standard_error"))
                if accuracy.value <= chance + 2 * error:
                    notes.append(f"The {side} accuracy is within two standard errors of chance ({chance:.1%}).")
        return notes + timing_notes(_plain(self.dense), _plain(self.pruned), self.environment)

    def to_markdown(self) -> str:
        """The content of report.md."""
        parts = [f"# {self.name}", *(f"> **Note.** {note}" for note in self.warnings())]
        parts += [f"    {self.command}", self._what_was_run()]
        if self.dense:
            parts += ["## Dense and pruned", self._comparison(), how_list(self.pruned)]
        if classes := class_block(_plain(self.dense), _plain(self.pruned)):
            parts += ["## IoU of each class", classes]
        if operators := profile_blocks(self.dense, self.pruned):
            parts += ["## Where the time went", operators]
        parts += [f"{self.saved}."] if self.saved else []
        if texts := text_blocks({"Dense": _plain(self.dense), "Pruned": _plain(self.pruned)}):
            parts += ["## What they write", texts]
        if self.recovery and self.recovery.history:
            parts += ["## Recovery", history_table(with_seconds(self.recovery))]
        if self.plan and self.plan.tokens:
            parts += ["## Tokens per block", self._token_table()]
        if self.plan and self.plan.blocks:
            parts += ["## Blocks", self._blocks_line()]
        others = bool(self.plan and (self.plan.tokens or self.plan.blocks))
        if self.plan and self.plan.groups and not (others and self.plan.keeps_all_units):
            parts += ["## What was kept", self._kept_table()]
        if self.plan and self.plan.matrices:
            parts += ["## Zeros per matrix", self._zeros_table()]
        parts += self.sections
        parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in [*self.pictures, *self.plots]]
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds)
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items() if number)
        parts += ["## How it ran", f"Seconds: {spent}.", *self.joules.in_words(METERED)]
        parts += [f"Versions: {versions}.", self._provenance()]
        return "\n\n".join(parts) + "\n"

    def _comparison(self) -> str:
        """The table of figures; with the pruned model before recovery where that was measured."""
        if self.unrecovered:
            return three_columns(self.dense, self.unrecovered, self.pruned)
        return markdown_table(self.dense, self.pruned)

    def _what_was_run(self) -> str:
        place = "no device"
        if self.device:
            place = f"{self.device['name']} ({self.device['type']}, {self.device['cpu_threads']} CPU threads)"
            if "world_size" in self.device:
                place += f", in {self.device['world_size']} processes ({self.device['backend']})"
        plan = self.plan
        if plan is None or plan.budget is None:
            what = f"{self.model_name} on {self.data_name}, nothing" if self.model_name else "Nothing"
            return f"{what} was pruned. Seed {self.seed}, on {place}."
        recovery = self.recovery.facts if self.recovery else {}
        after = (
            f" Recovered by {recovery['method']}: {recovery['epochs']} epochs, {recovery['samples_seen']:,} samples, "
            f"{recovery['trainable_params']:,} trained parameters, {recovery['seconds']:.1f} s; "
            f"the weights after epoch {recovery['used_epoch']} are measured."
            if recovery
            else ""
        )
        return (
            f"{self.model_name} on {self.data_name}, pruned by {self.method}: {plan.ratio_asked:.1%} of "
            f"the {plan.budget} were to go, {plan.ratio_reached:.2%} went.{after} Seed {self.seed}, on {place}."
        )

    def _blocks_line(self) -> str:
        assert self.plan and self.plan.blocks
        blocks, details = self.plan.blocks, self.plan.details
        kept, gone = (", ".join(map(str, which)) or "none" for which in (blocks.kept, blocks.removed))
        found = {name: details.get(f"{name}_removed") for name in ("macs", "params")}
        shares = [f"{share:.2%} of the {name}" for name, share in found.items() if share is not None]
        took = f" They are {' and '.join(shares)}." if shares and blocks.removed else ""
        return f"Kept of {blocks.count}: {kept}. Removed: {gone}.{took}"

    def _kept_table(self) -> str:
        assert self.plan
        rows = ["| units | layer | kept | of |", "|---|--:|--:|--:|"]
        rows += [f"| {g.name} | {g.layer} | {len(g.kept)} | {g.count} |" for g in self.plan.groups]
        return "\n".join(rows)

    def _zeros_table(self) -> str:
        assert self.plan
        rows = ["| linear | block | zeros | of | share |", "|---|--:|--:|--:|--:|"]
        rows += [
            f"| {m.name} | {m.layer} | {m.zeros:,} | {m.count:,} | {m.zeros / m.count:.2%} |"
            for m in self.plan.matrices
        ]
        return "\n".join(rows)

    def _token_table(self) -> str:
        assert self.plan and self.plan.tokens
        if isinstance(self.plan.tokens, Keeping):
            return kept_tokens(self.plan, self.pruned.get("macs"))
        lines = ["| block | in the attention | in the MLP |", "|--:|--:|--:|"]
        lines += [f"| {layer} | {n} | {m} |" for layer, (n, m) in enumerate(self.plan.token_counts)]
        weighted = "counts each as often as it has members" if self.plan.tokens.proportional else "counts each once"
        lines += ["", f"Merged before the {NAMES[self.plan.tokens.before]}; attention {weighted}."]
        return "\n".join(lines)

    def _provenance(self) -> str:
        found = ", ".join(f"{name} `{(value or 'none')[:16]}`" for name, value in self.fingerprints.items())
        return f"Fingerprints: {found}. {self.scores_from().capitalize()}."


def config_hash(config: dict[str, Any]) -> str:
    """Hash of a resolved configuration, whatever the order of its keys; where things are kept does not count."""
    return key_hash({key: value for key, value in config.items() if key not in ("storage", "tracker")})


def _plain(found: Measurements) -> dict[str, Any]:
    return {name: measured.to_json() for name, measured in found.items()}


def with_seconds(trained: Recovered) -> list[dict[str, float]]:
    """The history with the seconds that each epoch took; rows of a cut have none."""
    spent = iter(trained.facts.get("epoch_seconds", []))
    return [
        row if "train_loss" not in row else {**row, "seconds": next(spent, float("nan"))} for row in trained.history
    ]


if __name__ == "__main__":
    import sys

    from evals.sweep import main

    sys.exit(main(sys.argv[1:]))
