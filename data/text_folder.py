"""Any folder of plain text: `train*.txt`, and `validation*.txt` or `test*.txt`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.causal_text import CausalText, Loaded, Sizes
from data.corpus import Corpus, Document, stream_of
from data.documents import demanded_files, read_texts
from utils.errors import InputError
from utils.rules import Count, ExistingPath, Seed, checked

HELD_OUT = ("validation", "valid", "test")


@checked
def text_folder(
    *,
    root: ExistingPath,
    separator: str | None = "<|endoftext|>",
    length: Count = 2048,
    batch_size: Count = 4,
    calibration_samples: Count = 128,
    calibration_length: Count = 2048,
    calibration_batch_size: Count = 4,
    train_samples: Count | None = None,
    validation_samples: Count | None = None,
    tokens: Count | None = None,
    calibration: Any = None,
    seed: Seed = 0,
) -> "TextFolder":
    """Choose a folder; it is read when the model, and so the tokenizer, is there.

    Args:
        root: The folder. Every file is a document, or several where `separator` stands in it.
        separator: What stands between documents of one file; None: nothing does.
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
        InputError: If a value breaks its rule, or files of a split are missing.
    """
    sizes = Sizes(
        length, batch_size, calibration_samples, calibration_length, calibration_batch_size, train_samples,
        validation_samples, tokens, seed,
    )  # fmt: skip
    found = TextFolder(name=Path(root).name, sizes=sizes, calibration=calibration, root=Path(root), separator=separator)
    for split in (("train",), HELD_OUT):
        demanded_files(found.root, split, (".txt",))
    return found


@dataclass(frozen=True, kw_only=True)
class TextFolder(CausalText):
    """A folder that waits for a tokenizer; see `text_folder` for the fields."""

    root: Path
    separator: str | None

    def documents(self, names: tuple[str, ...]) -> list[str]:
        """Documents of a split without the white space around them, in the order of their files.

        Raises:
            InputError: If there are none.
        """
        texts = [text for path in demanded_files(self.root, names, (".txt",)) for text in read_texts(path)]
        parts = [part.strip() for text in texts for part in (text.split(self.separator) if self.separator else [text])]
        if not (found := [part for part in parts if part]):
            raise InputError(f"data.root={self.root}: the files of {names[0]} hold no text")
        return found

    def load(self, tokenizer: Any) -> Loaded:
        """Every document tokenised by itself; windows are of the stream of training documents."""
        texts, train = self.documents(HELD_OUT), stream_of(tokenizer, self.documents(("train",)))
        name = f"{self.name}-validation"
        corpus = Corpus(
            name=name,
            tokens=stream_of(tokenizer, texts),
            documents=[Document(text, text) for text in texts],
            tokenizer=tokenizer,
            document_protocol=f"{name}/documents",
            most_chunks=self.sizes.validation_samples,
        )
        return Loaded(train, self.stream_windows(train), corpus)
