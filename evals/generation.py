"""Text that models write: fixed prompts, a fixed number of new tokens, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from data.base import DataBundle
from data.language_modelling import IGNORED, exponential, token_costs
from evals.base import Measurement, Measurements, Subject
from evals.continuations import REPEATED, distinct, repetition_rate, sampler
from evals.prompts import (
    first_words,
    on_device,
    refuse_beyond_context,
    spelled,
    text_prompts,
    why_not_decodable,
)
from models.base import PrunableModel
from models.decoding import Decoding, Pick, generate, greedy
from utils.errors import InputError
from utils.progress import Advance, progress_bar
from utils.rules import Count, Positive, Range, Seed, check_fields

Mode = Literal["greedy", "sampled"]
Mass = Annotated[float, Range(0, 1, open_low=True)]
GRAMS = (1, 2, 3)
UNITS = {
    "perplexity": "per token, under the dense model",
    **{f"distinct_{n}": f"of {n}-grams" for n in GRAMS},
    "repetition": f"of {REPEATED}-grams",
}
HOW = {
    **{f"distinct_{n}": f"distinct {n}-grams over all {n}-grams of all continuations" for n in GRAMS},
    "repetition": f"mean share of {REPEATED}-grams that have occurred before in their continuation",
}


@dataclass(frozen=True)
class Continuation:
    """What a model made of one prompt.

    Attributes:
        prompt: The prompt as text.
        text: The new tokens as text.
        tokens: Their ids.
        nats: Mean cost of a new token under the dense model.
        eos_at: Place of the first end-of-sequence token among them, from 0; it stops nothing. None: there is none.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    nats: float
    eos_at: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what is counted in this continuation alone."""
        grams = {f"distinct_{n}": distinct([self.tokens], n) for n in GRAMS}
        return {
            "prompt": self.prompt, "text": self.text, "perplexity": exponential(self.nats), **grams,
            "repetition": repetition_rate(self.tokens), "eos_at": self.eos_at, "tokens": list(self.tokens),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations of fixed prompts, and what can be counted in them.

    For each mode: `<mode>_perplexity`, the exponential of the mean cost of all new tokens under the dense model
    (the first one measured; a low figure is what the dense model would write too, a loop included);
    `<mode>_distinct_1`, `_2`, `_3` over all continuations together; `<mode>_repetition`, the mean share of
    4-grams that have occurred before in their continuation. Formulas: `evals/continuations.py`.

    Attributes:
        prompts: Texts to continue; None: the beginnings of validation documents.
        count: How many beginnings are taken.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens of every continuation; an end-of-sequence token does not stop it, its place is recorded.
        modes: `greedy` (the likeliest token), `sampled`, or both.
        temperature: Of sampling; divides the logits.
        top_p: Sampling keeps the likeliest tokens with this much of the mass.
        seed: Of sampling; the same draws for every model.
    """

    prompts: tuple[str, ...] | None = None
    count: Count = 3
    prompt_tokens: Count = 16
    new_tokens: Count = 64
    modes: tuple[Mode, ...] = ("greedy", "sampled")
    temperature: Positive = 0.8
    top_p: Mass = 0.95
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompts is not None and not self.prompts:
            raise InputError("evals.generation.prompts=[]: must hold at least one text, or be null")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise InputError(f"evals.generation.modes={list(self.modes)}: must be greedy, sampled or both")

    def check(self, model: PrunableModel, data: DataBundle) -> None:
        """Refuse, before any work, prompts that leave no room for their continuation (InputError)."""
        if why_not_decodable(model, data) is not None:
            return
        if self.prompts is None:
            refuse_beyond_context(model, "evals.generation.prompt_tokens", self.prompt_tokens, self.new_tokens)
            return
        for number, tokens in enumerate(text_prompts(model, self.prompts)):
            key, what = f"evals.generation.prompts[{number}] tokens", "a prompt"
            refuse_beyond_context(model, key, len(tokens), self.new_tokens, what)

    def measure(self, subjects: Sequence[Subject]) -> list[Measurements]:
        """Let each model continue the same prompts."""
        dense = subjects[0]
        if reason := why_not_decodable(dense.model, dense.data):
            return [{f"{self.modes[0]}_perplexity": Measurement(None, UNITS["perplexity"], reason)} for _ in subjects]
        self.check(dense.model, dense.data)
        prompts = self._prompts(dense)
        with progress_bar("generation", len(subjects) * len(self.modes) * len(prompts)) as advance:
            return [self._of(subject, dense.model, prompts, advance) for subject in subjects]

    def _prompts(self, dense: Subject) -> list[Tensor]:
        if self.prompts is not None:
            return text_prompts(dense.model, self.prompts)
        return first_words(dense.data, self.count, self.prompt_tokens)

    def _of(self, subject: Subject, dense: PrunableModel, prompts: Sequence[Tensor], advance: Advance) -> Measurements:
        found: Measurements = {}
        for mode in self.modes:
            texts = []
            for number, prompt in enumerate(prompts):
                texts.append(continuation(subject, dense, prompt, self.new_tokens, self._picker(mode, number)))
                advance(f"{subject.model.name}, {mode}")
            found |= {f"{mode}_{name}": figure for name, figure in figures(texts, self._settings(mode)).items()}
        return found

    def _picker(self, mode: Mode, number: int) -> Pick:
        if mode == "greedy":
            return greedy
        # each prompt draws for itself, so that a longer list leaves the earlier ones as they were
        return sampler((1_000_003 * self.seed + number) % 2**32, self.temperature, self.top_p)

    def _settings(self, mode: Mode) -> dict[str, Any]:
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed} if mode == "sampled" else {}
        return {"mode": mode, "new_tokens": self.new_tokens, **drawn}


def continuation(subject: Subject, dense: PrunableModel, prompt: Tensor, count: int, pick: Pick) -> Continuation:
    """Let a model continue one prompt (P,) by `count` tokens, and let the dense model judge them."""
    assert isinstance(subject.model, Decoding)
    new = generate(subject.model, on_device(subject.model, prompt[None]), count, pick)[0].cpu()  # (count,)
    tokens = tuple(new.tolist())
    own = subject.model.preprocessing
    ends = () if own is None else own.ends
    return Continuation(
        prompt=spelled(subject.model, prompt),
        text=spelled(subject.model, new),
        tokens=tokens,
        nats=mean_cost(dense, prompt, new),
        eos_at=next((place for place, token in enumerate(tokens) if token in ends), None),
    )


@torch.inference_mode()
def mean_cost(model: PrunableModel, prompt: Tensor, new: Tensor) -> float:
    """Nats per token of `new` (N,) as a model reads it after `prompt` (P,), in one pass without a cache."""
    whole = torch.cat([prompt, new])[None]  # (1, P + N)
    wanted = torch.cat([torch.full((len(prompt) - 1,), IGNORED), new, torch.tensor([IGNORED])])[None]
    placed = on_device(model, whole)
    logits = model.logits({"input_ids": placed, "attention_mask": torch.ones_like(placed)})
    return float(token_costs(logits, wanted.to(model.device))[..., 0].double().sum()) / len(new)


def figures(texts: Sequence[Continuation], settings: Mapping[str, Any]) -> dict[str, Measurement]:
    """Perplexity with all texts in its details, distinct n-grams and repetition."""
    nats = sum(text.nats for text in texts) / len(texts)
    details = {**settings, "continuations": [text.to_json() for text in texts]}
    judged = "exponential of the dense model's mean cost of all new tokens"
    found = {"perplexity": Measurement(exponential(nats), UNITS["perplexity"], details=details, how=judged)}
    tokens = [text.tokens for text in texts]
    repeated = [rate for rate in map(repetition_rate, tokens) if rate is not None]
    counts = {f"distinct_{n}": distinct(tokens, n) for n in GRAMS}
    counts["repetition"] = sum(repeated) / len(repeated) if repeated else None
    short = "a continuation has fewer tokens than an n-gram"
    return found | {name: Measurement(value, UNITS[name], short, how=HOW[name]) for name, value in counts.items()}
