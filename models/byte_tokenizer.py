"""A tokenizer that needs no vocabulary file: one token a byte of UTF-8, and two special ones."""

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(longest: int) -> Any:
    """Build it; a text starts with `<s>`, and any text comes back as it was.

    Args:
        longest: Most tokens that the model can take.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {symbol: number for number, symbol in enumerate([*alphabet, BOS, EOS])}
    rules = Tokenizer(BPE(vocab=ids, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    rules.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    rules.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token=BOS, eos_token=EOS, model_max_length=longest)
