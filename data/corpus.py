"""Text that a language model is measured on: one stream of tokens, and the documents that it came from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: What the model reads.
        raw: What words and bytes are counted in, where that is another text.
    """

    text: str
    raw: str


@dataclass(frozen=True)
class Corpus:
    """A validation text in both forms, for the protocols of `evals/perplexity.py` and of `evals/documents.py`.

    Attributes:
        name: Such as `wikitext2-test`.
        tokens: The whole stream, (T,) int64.
        documents: The same text, document by document.
        tokenizer: A fast tokenizer of transformers.
        document_protocol: Name of how likelihoods of documents are counted.
        most_chunks: Chunks of the stream that count at most; None: all.
    """

    name: str
    tokens: Tensor
    documents: Sequence[Document]
    tokenizer: Any
    document_protocol: str
    most_chunks: int | None = None

    def chunks(self, length: int) -> Tensor:
        """The stream in chunks without overlap, the tail dropped: (chunks, length)."""
        return chunked(self.tokens, length)[: self.most_chunks]

    def bos(self, chunks: Tensor) -> str:
        """How many of the chunks start with the beginning-of-sequence token, in words."""
        begin = self.tokenizer.bos_token_id
        inside = 0 if begin is None else int((chunks == begin).sum())
        if not inside:
            return "none"
        return "first token only" if inside == 1 and int(chunks[0, 0]) == begin else f"{inside} in the stream"


def chunked(tokens: Tensor, length: int) -> Tensor:
    """Cut a stream (T,) into `floor(T / length)` chunks, (chunks, length)."""
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def encoded(tokenizer: Any, text: str) -> Tensor:
    """Tokens of one text with the tokenizer's defaults, (T,) int64."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def stream_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokens of texts one after the other, each tokenised by itself with the tokenizer's defaults, (T,) int64."""
    found = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return torch.tensor([token for tokens in found for token in tokens], dtype=torch.int64)


def token_hash(tokens: Tensor) -> str:
    """Hash of token ids, the same on every machine."""
    return hashlib.sha256(tokens.long().cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
