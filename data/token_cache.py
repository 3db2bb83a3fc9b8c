"""Token ids that are made once: kept in storage by everything that they depend on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import tokenizers
import torch
from torch import Tensor

from utils.storage import Artifact, Scratch, Store

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class TokenCache:
    """Where the token ids of one source of text under one tokenizer lie.

    Attributes:
        store: Keeps them; None: they are made anew each time.
        folder: Readable place below its root.
        key: What all of them depend on: the text, the tokenizer, and the code between the two.
    """

    store: Store | None = None
    folder: str = ""
    key: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str, compute: Callable[[], Tensor], **settings: Any) -> Callable[[], Tensor]:
        """What gives one tensor of token ids, fetched or made when it is first asked for.

        Args:
            name: What it is, such as `train`.
            compute: Makes it, int64 of any shape.
            settings: What it depends on beside the cache's own key, as plain values.
        """
        fetch = self.parts(name, lambda: {"tokens": compute()}, **settings)
        return cache(lambda: fetch()["tokens"])

    def parts(self, name: str, compute: Callable[[], Parts], **settings: Any) -> Callable[[], Parts]:
        """The same for several tensors by name."""
        return cache(partial(self._fetch, name, compute, settings))

    def _fetch(self, name: str, compute: Callable[[], Parts], settings: Mapping[str, Any]) -> Parts:
        if self.store is None:
            return compute()

        def kept(scratch: Scratch) -> Artifact:
            found = compute()
            # token ids and lengths of documents are far below 2^31
            narrow = {key: values.to(torch.int32) for key, values in found.items()}
            return Artifact(narrow, {key: list(values.shape) for key, values in found.items()})

        key = {"source": dict(self.key), "part": name, "of": dict(settings), "tokenizers": tokenizers.__version__}
        found = self.store.fetch(self.folder, name, key, kept)
        return {key: values.long() for key, values in found.artifact.tensors.items()}
