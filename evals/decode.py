"""How fast language models write: prefill, time to first token and decoding, each measured by itself."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from data.base import DataBundle
from data.corpus import token_hash
from evals.base import Measurement, Measurements, Subject
from evals.compressed import ONLY_COMPRESSED, only_compressed
from evals.decode_runs import DecodeRun, compiled_graphs
from evals.harness import Timed
from evals.prompts import batch_of_prompts, refuse_beyond_context, why_not_decodable
from evals.semi_structured import Probe, probed, sparse_kernels, sparse_linears, why_not_sparse
from evals.timing import Protocol, steps_of, time_interleaved
from evals.timing_statistics import Timings, comparison, statistics_ms
from models.base import PrunableModel
from utils.errors import InputError
from utils.memory import out_of_memory
from utils.progress import progress_bar
from utils.rules import Count, Positive, check_fields

UNITS = {"prefill": "ms", "first_token": "ms", "decode": "tokens/s", "kv_cache": "byte"}
HOW = {
    "prefill": "median time to read the prompts into an empty cache, models interleaved (ABBA)",
    "first_token": "median time from token ids on the host to the first new id on the host, timed as such (ABBA)",
    "decode": "tokens after the first over the median time of their steps, one token each with a cache (ABBA)",
    "kv_cache": "bytes of the cache's own tensors, with the prompts and all new tokens but the last in them",
}


@dataclass(frozen=True)
class Setting:
    """One batch size, eager or compiled."""

    batch: int
    compiled: bool

    @property
    def tag(self) -> str:
        """What its figures' names end with."""
        return f"{'compiled_' if self.compiled else ''}batch_{self.batch}"


@dataclass
class Entrant:
    """One model under one setting: how it runs, or why it does not; kernels that it is timed with."""

    subject: Subject
    run: DecodeRun | None = None
    reason: str | None = None
    linears: Mapping[str, nn.Linear] | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Speed and memory of writing text with a key and value cache, models interleaved (ABBA).

    For each batch size: `prefill_batch_<n>`, ms to read the prompt into an empty cache; `first_token_batch_<n>`, ms
    from token ids on the host to the first new id on the host, timed as such; `decode_batch_<n>`, tokens/s of
    the steps after it at a fixed output length (no end-of-sequence token stops it); `kv_cache_batch_<n>`, bytes of the
    cache's tensors at the end. `weight_memory`: bytes of all parameters and buffers. Compiled figures carry
    `compiled_` before `batch`; their cache has its full length from the start, and `compile_seconds` says how long
    compiling took, which happens before anything is timed.

    A model that differs from the dense one by zeros in its weights alone is not timed: null, compression only,
    unless `semi_structured` finds layers that a sparse kernel serves faster.

    Attributes:
        batches: Batch sizes.
        prompt_tokens: Length of every prompt; the same tokens of the validation text for all models.
        new_tokens: Tokens written, the first one included.
        compiled: Time torch.compile as well, beside eager.
        semi_structured: `auto`: a model with two zeros in every four weights runs on torch's semi-structured kernels
            in the layers where a probe at the very number of rows measures them faster (CUDA only).
        seconds: Time to spend on each figure of each model, about.
        warmup: Untimed calls first.
        blocks: ABBA blocks.
    """

    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: Count = 64
    new_tokens: Count = 32
    compiled: bool = False
    semi_structured: Literal["off", "auto"] = "off"
    seconds: Positive = 1.0
    warmup: Count = 3
    blocks: Count = 5

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise InputError(f"evals.decode.batches={list(self.batches)}: must be different whole numbers above 0")
        if self.new_tokens < 2:
            raise InputError(f"evals.decode.new_tokens={self.new_tokens}: must be at least 2, the first is no decoding")

    @property
    def resident_only(self) -> Mapping[str, str]:
        """Figures that mean nothing while blocks visit the device, with their units."""
        return {f"{name}_{setting.tag}": unit for setting in self._settings() for name, unit in UNITS.items()}

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse, before any work, a prompt that leaves no room for the new tokens (InputError)."""
        if why_not_decodable(model, data) is None:
            refuse_beyond_context(model, "evals.decode.prompt_tokens", self.prompt_tokens, self.new_tokens)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Time all models against each other; the first one is the reference of `speedup`."""
        dense = subjects[0]
        if reason := why_not_decodable(dense.model, dense.data):
            return [self._nothing(reason) for _ in subjects]
        self.check(dense.model, dense.data)
        found: list[Measurements] = [{"weight_memory": weight_memory(s.model)} for s in subjects]
        for setting in self._settings():
            for mine, more in zip(found, self._under(setting, subjects), strict=True):
                mine.update(more)
        return found

    def _settings(self) -> Iterator[Setting]:
        for compiled in (False, True) if self.compiled else (False,):
            yield from (Setting(batch, compiled) for batch in self.batches)

    def _nothing(self, reason: str) -> Measurements:
        tags = [setting.tag for setting in self._settings()]
        return {f"{name}_{tag}": Measurement(None, unit, reason) for tag in tags for name, unit in UNITS.items()}

    def _under(self, setting: Setting, subjects: Sequence[Subject]) -> list[Measurements]:
        """All figures of one setting for each subject."""
        torch._dynamo.reset()
        entrants = [self._entrant(setting, subject, subjects[0]) for subject in subjects]
        found: list[Measurements] = [{} for _ in subjects]
        for name, call_of in (("prefill", prefill), ("first_token", first_token), ("decode", decode)):
            rows = setting.batch * (1 if name == "decode" else self.prompt_tokens)
            for mine, figure in zip(found, self._figure(name, call_of, rows, setting, entrants), strict=True):
                mine[f"{name}_{setting.tag}"] = figure
        for mine, entrant in zip(found, entrants, strict=True):
            mine[f"kv_cache_{setting.tag}"] = self._cache(setting, entrant)
        return found

    def _entrant(self, setting: Setting, subject: Subject, dense: Subject) -> Entrant:
        prompts = batch_of_prompts(dense.data, setting.batch, self.prompt_tokens)
        entrant = Entrant(subject, DecodeRun(subject.model, prompts, self.new_tokens, setting.compiled))
        assert entrant.run
        try:
            entrant.digest = token_hash(entrant.run.ready())
        except Exception as error:  # what a compiler lacks shows as its own error
            if out_of_memory(error):
                return Entrant(subject, reason=beyond_memory(setting))
            if not setting.compiled:
                raise
            return Entrant(subject, reason=f"torch.compile failed: {first_line(error)}")
        if only_compressed(subject.model, dense.model):
            self._sparse(setting, entrant)
        return entrant

    def _sparse(self, setting: Setting, entrant: Entrant) -> None:
        entrant.reason = ONLY_COMPRESSED
        if self.semi_structured == "off":
            return
        why = (
            "only eager code is timed on sparse kernels" if setting.compiled else why_not_sparse(entrant.subject.model)
        )
        if why is not None:
            entrant.reason = f"{ONLY_COMPRESSED} ({why})"
            return
        entrant.linears = sparse_linears(entrant.subject.model.network)

    def _figure(
        self,
        name: str,
        call_of: Callable[[DecodeRun], Callable[[], object]],
        rows: int,
        setting: Setting,
        entrants: Sequence[Entrant],
    ) -> list[Measurement]:
        """Time one kind of call of all models that can be timed; the others have their reason."""
        found: list[Measurement | None] = []
        timed: list[tuple[int, Entrant, list[Probe]]] = []
        for number, entrant in enumerate(entrants):
            probes = probed(entrant.linears, rows) if entrant.linears else []
            found.append(self._refusal(name, rows, entrant, probes))
            if found[-1] is None:
                timed.append((number, entrant, probes))
        graphs = compiled_graphs()
        try:
            timings = self._time(f"{name}, {setting.tag}", [(entrant, probes) for _, entrant, probes in timed], call_of)
        except Exception as error:
            if not out_of_memory(error):
                raise
            nothing = Measurement(None, UNITS[name], beyond_memory(setting))
            return [figure or nothing for figure in found]
        again = compiled_graphs() - graphs if setting.compiled else 0
        for (number, entrant, probes), timing in zip(timed, timings, strict=True):
            reference = timings[0] if timed[0][0] == 0 else None
            figure = self._measured(name, setting, entrant, probes, timing, reference)
            found[number] = figure if not again else compiled_meanwhile(figure, again)
        return [figure for figure in found if figure is not None]

    def _refusal(self, name: str, rows: int, entrant: Entrant, probes: Sequence[Probe]) -> Measurement | None:
        if entrant.linears is None:
            return None if entrant.reason is None else Measurement(None, UNITS[name], entrant.reason)
        if any(probe.faster for probe in probes):
            return None
        why = f"compression only: none of {len(probes)} layers is faster on a semi-structured kernel at {rows} rows"
        return Measurement(None, UNITS[name], why, {"semi_structured": [probe.to_json() for probe in probes]})

    def _time(
        self,
        title: str,
        entrants: Sequence[tuple[Entrant, Sequence[Probe]]],
        call_of: Callable[[DecodeRun], Callable[[], object]],
    ) -> list[Timings]:
        if not entrants:
            return []
        protocol = Protocol(self.warmup, self.blocks, self.seconds, least_calls=2 * self.blocks)
        with ExitStack() as stack:
            for entrant, probes in entrants:
                stack.enter_context(sparse_kernels(entrant.linears or {}, probes))
            calls = [call_of(entrant.run) for entrant, _ in entrants if entrant.run]
            advance = stack.enter_context(progress_bar(title, steps_of(protocol, len(calls)), still=True))
            return time_interleaved(calls, entrants[0][0].subject.model.device, protocol, advance)

    def _measured(
        self,
        name: str,
        setting: Setting,
        entrant: Entrant,
        probes: Sequence[Probe],
        timing: Timings,
        reference: Timings | None,
    ) -> Measurement:
        median = statistics.median(timing.all_ms)
        details: dict[str, Any] = {**self._shape(setting), **statistics_ms(timing)}
        if entrant.run is not None and entrant.run.compile_seconds is not None:
            details["compile_seconds"] = entrant.run.compile_seconds
        if reference is not None:
            details |= comparison(reference, timing)
        if probes:
            details["semi_structured"] = [probe.to_json() for probe in probes]
        files = {"raw.json": Timed(timing, None, {}).raw}
        if name != "decode":
            return Measurement(median, UNITS[name], details=details, how=HOW[name], files=files)
        steps = self.new_tokens - 1
        details |= {"ms_per_step": median / steps, "output_hash": entrant.digest}
        speed = setting.batch * steps * 1000 / median
        return Measurement(speed, UNITS[name], details=details, how=HOW[name], files=files)

    def _cache(self, setting: Setting, entrant: Entrant) -> Measurement:
        if entrant.run is None:
            return Measurement(None, UNITS["kv_cache"], entrant.reason)
        try:
            held = entrant.run.cache_bytes()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Measurement(None, UNITS["kv_cache"], beyond_memory(setting))
        return Measurement(held, UNITS["kv_cache"], details=self._shape(setting), how=HOW["kv_cache"])

    def _shape(self, setting: Setting) -> dict[str, Any]:
        return {
            "batch": setting.batch, "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens,
            "compiled": setting.compiled,
        }  # fmt: skip


def prefill(run: DecodeRun) -> Callable[[], object]:
    """The call that reads a prompt."""
    return run.prefill


def first_token(run: DecodeRun) -> Callable[[], object]:
    """The call from a prompt's ids to the first new id."""
    return run.first_token


def decode(run: DecodeRun) -> Callable[[], object]:
    """The call that writes all tokens after the first."""
    return run.decode


def beyond_memory(setting: Setting) -> str:
    """Why there is no figure where memory was too small."""
    return f"out of memory at batch {setting.batch}"


def compiled_meanwhile(figure: Measurement, graphs: int) -> Measurement:
    """No figure, since some of the time went into compiling."""
    return Measurement(None, figure.unit, f"torch.compile made {graphs} more graphs while it was timed", figure.details)


def weight_memory(model: PrunableModel) -> Measurement:
    """Bytes of all parameters and buffers, shared ones once."""
    held = {id(t): t for t in [*model.network.parameters(), *model.network.buffers()]}
    how = "bytes of all parameters and buffers, shared ones once"
    return Measurement(sum(t.numel() * t.element_size() for t in held.values()), "byte", how=how)


def first_line(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
