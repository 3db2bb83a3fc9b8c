"""C4, English: its first training shard for calibration, from local files or the Hugging Face hub."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as memoised
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.causal_text import CausalText, Loaded
from data.corpus import Document, encoded, stream_of
from data.documents import content_hash, demanded_files, read_texts, split_files
from data.token_cache import TokenCache
from data.windows import document_windows
from utils.errors import InputError
from utils.hub import from_cache_or_hub
from utils.rules import Count, ExistingPath

HUB = "allenai/c4"
SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
HELD_OUT = ("validation", "test")
MEASURED_DOCUMENTS = 1100
HELD_OUT_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class C4(CausalText):
    """C4, which waits for a tokenizer.

    Where `root` holds no validation file, the last tenth of the training documents is held out.

    Attributes:
        root: Folder with files whose names have `train` and, where there are any, `validation`: json.gz,
            jsonl or parquet with a column `text`, or plain files of one document each. None: the hub's
            `allenai/c4`, of which one shard a split is fetched.
    """

    train_samples: Count | None = 256
    validation_samples: Count | None = 256
    root: ExistingPath | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None:
            demanded_files(Path(self.root), ("train",))

    @property
    def name(self) -> str:
        """As the data set is called."""
        return "c4"

    def identity(self) -> str:
        """Hash of the files."""
        train, held_out = self.files()
        return content_hash([*train, *held_out])

    def files(self) -> tuple[list[Path], list[Path]]:
        """Files of the training documents, and of those to measure on where they have files of their own."""
        if self.root is None:
            return [_fetched(SHARDS["train"])], [_fetched(SHARDS["validation"])]
        return demanded_files(Path(self.root), ("train",)), split_files(Path(self.root), HELD_OUT)

    def documents(self) -> tuple[list[str], list[str]]:
        """Documents for training, and documents to measure on.

        Raises:
            InputError: If there are too few.
        """
        files, own = self.files()
        texts = [text for path in files for text in read_texts(path)]
        if own:
            return texts, [text for path in own for text in read_texts(path)][:MEASURED_DOCUMENTS]
        if not (held_out := len(texts) // HELD_OUT_SHARE):
            rule = f"must hold at least {HELD_OUT_SHARE} documents"
            raise InputError(f"data.root={self.root}: {rule}; it has {len(texts)}")
        return texts[:-held_out], texts[-held_out:][:MEASURED_DOCUMENTS]

    def load(self, tokenizer: Any, cache: TokenCache) -> Loaded:
        """Windows of single training documents; the first validation documents joined by spaces."""
        documents, encode = memoised(self.documents), partial(encoded, tokenizer)
        name = "c4-validation" if self.files()[1] else "c4-held-out"
        wanted = None if self.train_samples is None else self.train_samples * self.length
        return Loaded(
            name=name,
            train=cache.part("train", lambda: _stream(tokenizer, documents()[0], wanted), tokens=wanted),
            windows=lambda key: document_windows(documents()[0], encode, *self.drawn, key),
            measured=cache.part("measured", lambda: encode(" ".join(documents()[1]))),
            documents=lambda: [Document(text, text) for text in documents()[1]],
            document_protocol=f"{name}/documents",
        )


c4 = C4


def _stream(tokenizer: Any, texts: Sequence[str], wanted: int | None) -> Tensor:
    """As many of the training documents as training takes, each tokenised by itself."""
    parts: list[Tensor] = []
    # a thousand at a time until it is enough: a shard has hundreds of thousands
    for first in range(0, len(texts), 1000):
        if sum(map(len, parts)) < (math.inf if wanted is None else wanted):
            parts.append(stream_of(tokenizer, texts[first : first + 1000]))
    return torch.cat(parts)


def _fetched(file: str) -> Path:
    """One file of the hub's data set, from this machine's cache where it is there."""
    from huggingface_hub import hf_hub_download

    def load(only_here: bool) -> str:
        return hf_hub_download(HUB, file, repo_type="dataset", local_files_only=only_here)

    return Path(from_cache_or_hub(load, f"data=c4 ({HUB}, {file})", "data.root=<folder with its files>"))
