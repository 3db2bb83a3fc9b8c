"""One model set up to be timed while it writes: prefill, first token, and the steps after it, each by itself.

Shapes: B samples, P tokens of the prompt.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from evals.prompts import on_device
from models.base import PrunableModel
from models.decoding import Decoding, Step, cache_bytes, decoded, forked, greedy, positions_of, rewind

MOST_COMPILATIONS = 5


class DecodeRun:
    """The calls that are timed; every call does the same work on the same tokens.

    A growing cache is forked from the prompt's before each decoding, one of fixed length is set back. Only the
    latter can be compiled.

    Args:
        model: The model, which must be a `Decoding`.
        prompts: Token ids on the host, (B, P).
        count: New tokens, the first one included.
        compiled: Whether steps run compiled, on a cache of fixed length.
    """

    def __init__(self, model: PrunableModel, prompts: Tensor, count: int, compiled: bool = False) -> None:
        assert isinstance(model, Decoding)
        self.model, self.host, self.count, self.compiled = model, prompts, count, compiled
        self.tokens = on_device(model, prompts)
        self.positions = positions_of(self.tokens)
        self.length = prompts.shape[1]
        self.step: Step = torch.compile(model.next_logits, dynamic=False) if compiled else model.next_logits
        self.cache: Any = None
        self.first: Tensor
        self.compile_seconds: float | None = None

    @torch.inference_mode()
    def ready(self) -> Tensor:
        """Run everything once, compilation included; the new tokens, (B, count).

        Raises:
            Exception: What torch.compile can't do, code that it compiles again for every token included.
        """
        self.cache = self.model.new_cache(self.length + self.count if self.compiled else None)
        # a cache takes its shapes from the first tokens, which must not be part of what is compiled
        self.first = greedy(self.model.next_logits(self.tokens, self.positions, self.cache))
        return self._compile() if self.compiled else self.decode()

    def _compile(self) -> Tensor:
        """Run until nothing more is compiled; what all that took beyond a run of compiled code is noted."""
        seconds, graphs = [], -1
        # beyond its limit dynamo would go on with eager code, without a word
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            while graphs != compiled_graphs() and len(seconds) < MOST_COMPILATIONS:
                graphs, start = compiled_graphs(), time.perf_counter()
                self.prefill()
                found = self.decode()
                synchronized(self.model.device)
                seconds.append(time.perf_counter() - start)
        self.compile_seconds = sum(seconds) - len(seconds) * min(seconds)
        return found

    def prefill(self) -> Tensor:
        """Read the prompt into an empty cache; logits of the next token, (B, V)."""
        cache = self.cache if self.compiled else self.model.new_cache()
        if self.compiled:
            rewind(cache, 0)
        return self.step(self.tokens, self.positions, cache)

    def first_token(self) -> list[list[int]]:
        """From token ids on the host to the first new token's id on the host."""
        self.tokens.copy_(self.host)
        return greedy(self.prefill()).tolist()

    def decode(self) -> Tensor:
        """All new tokens after the first, one step each; (B, count)."""
        return decoded(self.step, self.first, self.length, self.count, self._prompt_cache())

    @torch.inference_mode()
    def cache_bytes(self) -> int:
        """Bytes of keys and values with the prompt and all new tokens but the last in them."""
        cache = self._prompt_cache()
        decoded(self.step, self.first, self.length, self.count, cache)
        return cache_bytes(cache)

    def _prompt_cache(self) -> Any:
        if not self.compiled:
            return forked(self.cache)
        rewind(self.cache, self.length)
        return self.cache


def compiled_graphs() -> int:
    """How many graphs this process has compiled since torch's counters were last set back."""
    return int(counters["stats"]["unique_graphs"])


def synchronized(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
