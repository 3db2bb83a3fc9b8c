"""What all text sources share: batches padded as late as possible, the calibration sample, the example."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from data.base import Batch, divided_rows, fingerprint_of
from models.preprocessing import TextPreprocessing
from utils.errors import InputError

if TYPE_CHECKING:
    from models.base import PrunableModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ROWS_AT_ONCE = 1000


class Samples(Protocol):
    """Samples that become token ids only when a batch needs them."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that pads them."""
        ...

    @property
    def padding_side(self) -> str | None:
        """Where padding goes; None: where the tokenizer puts it."""
        ...

    @property
    def targets(self) -> Batch:
        """What else belongs to each sample, by name, (N,)."""
        ...

    def __len__(self) -> int: ...

    def encoded(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Unpadded model inputs of some samples, by name one list of numbers a sample."""
        ...

    def lengths(self) -> list[int]:
        """Tokens of every sample, special ones included."""
        ...


S = TypeVar("S", bound=Samples)


@dataclass(frozen=True)
class Texts:
    """Samples of one or two texts each.

    Attributes:
        columns: The first texts, and the second ones where samples are pairs.
        targets: Labels and the like, (N,).
        tokenizer: A fast tokenizer of transformers.
        max_tokens: Longer samples are truncated, of a pair the longer text first.
    """

    columns: tuple[Sequence[str], ...]
    targets: Batch
    tokenizer: Any
    max_tokens: int

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def padding_side(self) -> None:
        """Where the tokenizer puts it."""
        return None

    def encoded(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Token ids and mask of some samples, and token types if the tokenizer has them."""
        return tokenized(self.tokenizer, [[column[row] for row in rows] for column in self.columns], self.max_tokens)

    def lengths(self) -> list[int]:
        """Tokens of every sample, special ones included."""
        parts = [range(first, min(first + ROWS_AT_ONCE, len(self))) for first in range(0, len(self), ROWS_AT_ONCE)]
        return [len(ids) for rows in parts for ids in self.encoded(rows)["input_ids"]]

    def fingerprint(self) -> str:
        """Hash of the texts, what belongs to them, and how they are tokenised."""
        # with their lengths, so that no two lists of texts read the same
        texts = (f"{len(text)}:{text}" for column in self.columns for text in column)
        targets = [part for name in sorted(self.targets) for part in (name, self.targets[name])]
        identity = tokenizer_identity(self.tokenizer)
        return fingerprint_of(len(self), len(self.columns), *texts, *targets, identity, self.max_tokens)


def tokenized(tokenizer: Any, columns: Sequence[Sequence[str]], most: int) -> dict[str, list[Any]]:
    """Tokenise texts or pairs of texts, unpadded and truncated to `most` tokens."""
    found = tokenizer(*map(list, columns), truncation=True, max_length=most, return_attention_mask=True)
    return {name: found[name] for name in INPUTS if name in found}


class TextBatches:
    """Batches that are tokenised when they are asked for and padded to their own longest sample.

    With a seed the order is shuffled, and depends on the seed and the epoch alone. Without
    one it is fixed, the longest samples first, so that a batch holds samples of like length.
    """

    def __init__(self, samples: Samples, batch_size: int, shuffle_seed: int | None = None) -> None:
        self.samples, self.batch_size, self.shuffle_seed = samples, batch_size, shuffle_seed
        self.epoch = 1
        self._rows: Tensor | None = None
        lengths = samples.lengths() if shuffle_seed is None else []
        self._longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.samples) if self._rows is None else len(self._rows)
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self._order()
        for first in range(0, len(order), self.batch_size):
            yield batch_of(self.samples, order[first : first + self.batch_size])

    def _order(self) -> list[int]:
        if self.shuffle_seed is None:
            return self._longest_first
        generator = torch.Generator().manual_seed(1_000_003 * self.shuffle_seed + self.epoch)
        if self._rows is not None:
            return self._rows[torch.randperm(len(self._rows), generator=generator)].tolist()
        return torch.randperm(len(self.samples), generator=generator).tolist()

    def divided(self, share: float, seed: int) -> tuple["TextBatches", "TextBatches"]:
        """Batches of all samples but a share, and batches of that share; for shuffled ones."""
        rest, held = divided_rows(len(self.samples), share, seed)
        return self._of(rest), self._of(held)

    def _of(self, rows: Tensor) -> "TextBatches":
        twin = copy.copy(self)
        twin._rows = rows
        return twin


def batch_of(samples: Samples, rows: Sequence[int]) -> Batch:
    """Some samples as one batch: inputs (B, T) padded to the longest of them, and their targets (B,)."""
    inputs = samples.tokenizer.pad(samples.encoded(rows), padding_side=samples.padding_side, return_tensors="pt")
    chosen = torch.tensor(list(rows))
    return {**inputs, **{name: tensor[chosen] for name, tensor in samples.targets.items()}}


def calibration_rows(count: int, batches: int, batch_size: int, seed: int, split: str = "training") -> list[list[int]]:
    """Draw the samples of each calibration batch without repeats, the same for the same seed.

    Raises:
        InputError: If that asks for no sample or for more than there are.
    """
    wanted = batches * batch_size
    if not 0 < wanted <= count:
        raise InputError(
            f"data.calibration_batches={batches}, data.calibration_batch_size={batch_size}: "
            f"{wanted} samples; must be between 1 and the {count} {split} samples"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]
    return [rows.tolist() for rows in order.split(batch_size)]


def calibration_sample(
    train: S, validation: S, batches: int, batch_size: int, seed: int
) -> tuple[S, list[list[int]], list[str]]:
    """Which samples scores are computed on: of train, or of validation where there is no train.

    Returns:
        The split that they are of, the rows of each batch, and a note where it is validation.

    Raises:
        InputError: As `calibration_rows` does.
    """
    if len(train):
        return train, calibration_rows(len(train), batches, batch_size, seed), []
    rows = calibration_rows(len(validation), batches, batch_size, seed, "validation (there are no training)")
    return validation, rows, ["data.root has no training split: the calibration sample is of the validation split"]


def mean_tokens(batches: Sequence[Batch]) -> int:
    """Mean length of the samples in tokens, padding left out, rounded."""
    return round(float(torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches]).double().mean()))


def example_of(texts: Texts, rows: Sequence[int], tokens: int) -> Batch:
    """One sample of exactly `tokens` tokens and no padding, without labels.

    It is the first of the given samples that is long enough, truncated; where none is, the
    texts of several are joined.

    Args:
        texts: Where the samples lie.
        rows: Which of them to look at, in this order.
        tokens: Length, special tokens included.

    Raises:
        InputError: If there is no sample of this length to be made.
    """
    chosen = [[column[row] for row in rows] for column in texts.columns]
    special = texts.tokenizer.num_special_tokens_to_add(pair=len(chosen) == 2)
    if tokens < special + len(chosen):
        raise InputError(f"data.tokens={tokens}: must be at least {special + len(chosen)}, special tokens included")
    found = tokenized(texts.tokenizer, chosen, tokens)
    long_enough = (row for row, ids in enumerate(found["input_ids"]) if len(ids) == tokens)
    row = next(long_enough, None)
    if row is None:
        found, row = _joined(texts, chosen, tokens), 0
    return {name: torch.tensor([numbers[row]]) for name, numbers in found.items()}


def _joined(texts: Texts, chosen: list[list[str]], tokens: int) -> dict[str, list[Any]]:
    """The sample whose last text is all the last texts, as often over as it takes."""
    times = 1
    while times <= tokens:
        joined = " ".join(chosen[-1] * times)
        found = tokenized(texts.tokenizer, [*[column[:1] for column in chosen[:-1]], [joined]], tokens)
        if len(found["input_ids"][0]) == tokens:
            return found
        times *= 2
    raise InputError(f"data.tokens={tokens}: the calibration texts hold no words to make an example of")


def text_preprocessing(model: "PrunableModel", source: str, max_tokens: int, tokens: int | None) -> TextPreprocessing:
    """The model's tokenizer, once it is clear that it can make these samples.

    Args:
        model: The model that reads them.
        source: Name of the data source, for messages.
        max_tokens: Length that samples are truncated to.
        tokens: Length of the example; None where the data decides.

    Raises:
        InputError: If the model has no tokenizer, can't pad, or takes no samples of such lengths.
    """
    found = model.preprocessing
    if not isinstance(found, TextPreprocessing):
        raise InputError(f"data={source} needs a model with a tokenizer; model={model.name} has none")
    if found.tokenizer.pad_token_id is None:
        raise InputError(f"data={source} needs a tokenizer with a padding token; that of model={model.name} has none")
    for key, value in (("max_tokens", max_tokens), ("tokens", tokens)):
        if value is not None and value > found.longest:
            raise InputError(f"data.{key}={value}: must be at most {found.longest}, all that model={model.name} takes")
    return found


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of what a tokenizer does to a text."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two are left over from the last call
    rules.update(truncation=None, padding=None)
    settings = (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_input_names)
    return hashlib.sha256(f"{json.dumps(rules, sort_keys=True)}{settings}".encode()).hexdigest()
