"""What language models are asked to continue: the same tokens for every model of a comparison."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.base import DataBundle
from data.corpus import Corpus, encoded
from data.language_modelling import LanguageModelling
from models.base import PrunableModel
from models.decoding import Decoding
from utils.errors import InputError


def why_not_decodable(model: PrunableModel, data: DataBundle) -> str | None:
    """Why a model can't be asked to continue a text; None if it can."""
    if not isinstance(model, Decoding):
        return f"model={model.name} does not continue text"
    return None if isinstance(data.task, LanguageModelling) else f"data={data.name} is no text for a language model"


def refuse_beyond_context(model: PrunableModel, key: str, prompt: int, new: int, what: str = "its prompt") -> None:
    """Raise an InputError if a prompt and its continuation are longer than what the model reads."""
    assert isinstance(model, Decoding)
    most = model.context - new
    if most < 1:
        metric = key.rpartition(".")[0] if key.startswith("evals.") else key
        raise InputError(
            f"{metric}.new_tokens={new}: must be below the context of model={model.name} ({model.context}), "
            "so that a prompt fits in front"
        )
    if prompt > most:
        raise InputError(
            f"{key}={prompt}: {what} must be at most {most} tokens long, the context of model={model.name} "
            f"({model.context}) without {new} new tokens"
        )


def corpus_of(data: DataBundle) -> Corpus | None:
    """The validation text; None if there is none."""
    return data.task.corpus if isinstance(data.task, LanguageModelling) else None


def batch_of_prompts(data: DataBundle, batch: int, length: int) -> Tensor:
    """The first tokens of the validation text in rows, begun again where it ends: (batch, length)."""
    corpus = corpus_of(data)
    stream = data.example["input_ids"].flatten() if corpus is None else corpus.tokens
    copies = -(-batch * length // len(stream))
    return stream.repeat(copies)[: batch * length].view(batch, length)


def text_prompts(model: PrunableModel, texts: Sequence[str]) -> list[Tensor]:
    """Tokens of each text, (P,); as the model's tokenizer reads them, but for an end-of-sequence token.

    Raises:
        InputError: If the model has no tokenizer, or a text is empty.
    """
    tokenizer: Any = model.preprocessing.tokenizer if model.preprocessing is not None else None
    if tokenizer is None:
        raise InputError(f"evals.generation.prompts: needs a model with a tokenizer; model={model.name} has none")
    found = [encoded(tokenizer, text) for text in texts]
    found = [t[:-1] if len(t) > 1 and int(t[-1]) == tokenizer.eos_token_id else t for t in found]
    if empty := [number for number, tokens in enumerate(found) if not len(tokens)]:
        raise InputError(f"evals.generation.prompts[{empty[0]}]={texts[empty[0]]!r}: must have at least one token")
    return found


def first_words(data: DataBundle, count: int, length: int) -> list[Tensor]:
    """The first `length` tokens of `count` validation documents spread over all that are long enough, (length,) each.

    Without documents, pieces of the validation text.
    """
    corpus = corpus_of(data)
    if corpus is None:
        return list(batch_of_prompts(data, count, length))
    read = (encoded(corpus.tokenizer, document.text) for document in _spread(corpus.documents, count))
    found = [tokens[:length] for tokens in read if len(tokens) > length]
    return found if len(found) == count else list(batch_of_prompts(data, count, length))


def _spread(documents: Sequence[Any], count: int) -> Sequence[Any]:
    """About `count` of many, evenly spread."""
    return documents[:: max(1, len(documents) // count)][:count]


def spelled(model: PrunableModel, tokens: Tensor) -> str:
    """Tokens (P,) as text; as numbers for a model without a tokenizer."""
    if model.preprocessing is None:
        return " ".join(map(str, tokens.tolist()))
    return model.preprocessing.tokenizer.decode(tokens.tolist())


def on_device(model: PrunableModel, tokens: Tensor) -> Tensor:
    """Tokens where the model is, int64."""
    return tokens.to(model.device, torch.int64)
