"""C4, English: its first training shard for calibration, from local files or the Hugging Face hub."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.causal_text import CausalText, Loaded, Sizes
from data.corpus import Corpus, Document, encoded, stream_of
from data.documents import demanded_files, read_texts, split_files
from data.windows import document_windows
from utils.errors import InputError
from utils.hub import from_cache_or_hub
from utils.rules import Count, ExistingPath, Seed, checked

HUB = "allenai/c4"
SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
HELD_OUT = ("validation", "test")
MEASURED_DOCUMENTS = 1100
HELD_OUT_SHARE = 10


@checked
def c4(
    *,
    root: ExistingPath | None = None,
    length: Count = 2048,
    batch_size: Count = 4,
    calibration_samples: Count = 128,
    calibration_length: Count = 2048,
    calibration_batch_size: Count = 4,
    train_samples: Count | None = 256,
    validation_samples: Count | None = 256,
    tokens: Count | None = None,
    calibration: Any = None,
    seed: Seed = 0,
) -> "C4":
    """Choose C4; it is read when the model, and so the tokenizer, is there.

    Args:
        root: Folder with files whose names have `train` and, where there are any, `validation`: json.gz,
            jsonl or parquet with a column `text`, or plain files of one document each. None: the hub's
            `allenai/c4`, of which one shard a split is fetched.
        length: Tokens of a training or validation chunk.
        batch_size: Chunks per batch.
        calibration_samples: Windows that scores are computed on.
        calibration_length: Tokens of each, whatever `length` is.
        calibration_batch_size: Windows per batch.
        train_samples: Chunks to train on at most; None: all.
        validation_samples: Chunks to validate on at most; None: all.
        tokens: Length of the sample that costs are stated for; None: that of a calibration window.
        calibration: Another source of text to calibrate on, with sizes of its own; None: this one.
        seed: Seeds the order of training and the calibration windows.

    Raises:
        InputError: If a value breaks its rule, or there are no files.
    """
    sizes = Sizes(
        length, batch_size, calibration_samples, calibration_length, calibration_batch_size, train_samples,
        validation_samples, tokens, seed,
    )  # fmt: skip
    found = C4(name="c4", sizes=sizes, calibration=calibration, root=Path(root) if root else None)
    if found.root is not None:
        demanded_files(found.root, ("train",))
    return found


@dataclass(frozen=True, kw_only=True)
class C4(CausalText):
    """C4, which waits for a tokenizer.

    Where `root` holds no validation file, the last tenth of the training documents is held out.
    """

    root: Path | None

    def documents(self) -> tuple[list[str], list[str], str]:
        """Documents for training, documents to measure on, and what to call these.

        Raises:
            InputError: If there are too few.
        """
        if self.root is None:
            return read_texts(_fetched(SHARDS["train"])), read_texts(_fetched(SHARDS["validation"])), "c4-validation"
        texts = [text for path in demanded_files(self.root, ("train",)) for text in read_texts(path)]
        if own := split_files(self.root, HELD_OUT):
            return texts, [text for path in own for text in read_texts(path)], "c4-validation"
        if not (held_out := len(texts) // HELD_OUT_SHARE):
            rule = f"must hold at least {HELD_OUT_SHARE} documents"
            raise InputError(f"data.root={self.root}: {rule}; it has {len(texts)}")
        return texts[:-held_out], texts[-held_out:], "c4-held-out"

    def load(self, tokenizer: Any) -> Loaded:
        """Windows of single training documents; the first validation documents joined by spaces."""
        texts, held_out, name = self.documents()
        measured, sizes = held_out[:MEASURED_DOCUMENTS], self.sizes
        corpus = Corpus(
            name=name,
            tokens=encoded(tokenizer, " ".join(measured)),
            documents=[Document(text, text) for text in measured],
            tokenizer=tokenizer,
            document_protocol=f"{name}/documents",
            most_chunks=sizes.validation_samples,
        )
        encode, samples = partial(encoded, tokenizer), sizes.calibration_samples
        windows = partial(document_windows, texts, encode, samples, sizes.calibration_length, sizes.seed, self.name)
        return Loaded(self._stream(tokenizer, texts), windows, corpus)

    def _stream(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """As many of the training documents as training takes, each tokenised by itself."""
        wanted = math.inf if self.sizes.train_samples is None else self.sizes.train_samples * self.sizes.length
        parts: list[Tensor] = []
        # a thousand at a time until it is enough: a shard has hundreds of thousands
        for first in range(0, len(texts), 1000):
            if sum(map(len, parts)) < wanted:
                parts.append(stream_of(tokenizer, texts[first : first + 1000]))
        return torch.cat(parts)


def _fetched(file: str) -> Path:
    """One file of the hub's data set, from this machine's cache where it is there."""
    from huggingface_hub import hf_hub_download

    def load(only_here: bool) -> str:
        return hf_hub_download(HUB, file, repo_type="dataset", local_files_only=only_here)

    return Path(from_cache_or_hub(load, f"data=c4 ({HUB}, {file})", "data.root=<folder with its files>"))
