"""WikiText-2, raw: from local files or the Hugging Face hub.

Measured on the test split, its rows joined by blank lines and tokenised once; calibrated on the training
split, its rows joined by spaces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.causal_text import CausalText, Loaded, Sizes
from data.corpus import Corpus, encoded
from data.documents import COLUMN, demanded_files, read_texts
from data.hub import hub_rows
from data.wikitext_pages import pages_of, rows_of
from utils.rules import Count, ExistingPath, Seed, checked

HUB, CONFIGURATION = "Salesforce/wikitext", "wikitext-2-raw-v1"
DOCUMENT_PROTOCOL = "lm-eval/wikitext@v2"


@checked
def wikitext2(
    *,
    root: ExistingPath | None = None,
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
) -> "Wikitext2":
    """Choose WikiText-2; it is read when the model, and so the tokenizer, is there.

    Args:
        root: Folder with files of the train and the test split: the hub's parquet, the original
            `wiki.test.raw`, or plain text. None: the hub's `Salesforce/wikitext`.
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
    found = Wikitext2(name="wikitext2", sizes=sizes, calibration=calibration, root=Path(root) if root else None)
    for split in ("train", "test") if found.root else ():
        demanded_files(found.root, (split,))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, kw_only=True)
class Wikitext2(CausalText):
    """WikiText-2, which waits for a tokenizer."""

    root: Path | None

    def rows(self, split: str) -> list[str]:
        """Rows of a split as the hub has them: lines with their line end, blank ones empty."""
        if self.root is None:
            found = hub_rows(HUB, CONFIGURATION, split, {COLUMN}, "data=wikitext2", "data.root=<folder with its files>")
            return [row[COLUMN] for row in found]
        files = demanded_files(self.root, (split,))
        return [
            row
            for path in files
            for text in read_texts(path)
            for row in (rows_of(text) if path.suffix in (".txt", ".raw") else [text])
        ]

    def load(self, tokenizer: Any) -> Loaded:
        """Both splits tokenised once: training rows joined by spaces, test rows by blank lines."""
        train, rows = encoded(tokenizer, " ".join(self.rows("train"))), self.rows("test")
        corpus = Corpus(
            name="wikitext2-test",
            tokens=encoded(tokenizer, "\n\n".join(rows)),
            documents=pages_of(rows),
            tokenizer=tokenizer,
            document_protocol=DOCUMENT_PROTOCOL,
            most_chunks=self.sizes.validation_samples,
        )
        return Loaded(train, self.stream_windows(train), corpus)
