"""Text that a language model is measured on: one stream of tokens, and the documents that it came from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data.token_cache import TokenCache


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: What the model reads.
        raw: What words and bytes are counted in, where that is another text.
    """

    text: str
    raw: str


class LazyDocuments(Sequence[Document]):
    """Documents that are read when the first of them is looked at."""

    def __init__(self, read: Callable[[], Sequence[Document]]) -> None:
        self._read = read

    @cached_property
    def _documents(self) -> Sequence[Document]:
        return self._read()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[index]


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
        facts: Where the text came from, as plain values; part of every record.
        cache: Keeps the documents' token ids.
    """

    name: str
    tokens: Tensor
    documents: Sequence[Document]
    tokenizer: Any
    document_protocol: str
    most_chunks: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    cache: TokenCache = TokenCache()

    def chunks(self, length: int) -> Tensor:
        """The stream in chunks without overlap, the tail dropped: (chunks, length)."""
        return chunked(self.tokens, length)[: self.most_chunks]

    @cached_property
    def document_tokens(self) -> list[list[int]]:
        """Token ids of every document without special tokens, tokenised once."""

        def compute() -> dict[str, Tensor]:
            found = tokenised(self.tokenizer, [document.text for document in self.documents], special=False)
            return {"tokens": flat(found), "lengths": torch.tensor([len(tokens) for tokens in found])}

        found = self.cache.parts("documents", compute)()
        return [part.tolist() for part in found["tokens"].split(found["lengths"].tolist())]

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
    return flat(tokenised(tokenizer, [text]))


def stream_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokens of texts one after the other, each tokenised by itself with the tokenizer's defaults, (T,) int64."""
    return flat(tokenised(tokenizer, texts))


def tokenised(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: What is tokenised, each by itself.
        special: Whether the tokenizer may add tokens of its own, such as one for the beginning.
    """
    return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def flat(found: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of several texts as one stream, (T,) int64."""
    return torch.tensor([token for tokens in found for token in tokens], dtype=torch.int64)


def token_hash(tokens: Tensor) -> str:
    """Hash of token ids, the same on every machine."""
    return hashlib.sha256(tokens.long().cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
