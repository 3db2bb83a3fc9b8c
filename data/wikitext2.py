"""WikiText-2, raw: from local files or the Hugging Face hub.

Measured on the test split, its rows joined by blank lines and tokenised once; calibrated on the training
split, its rows joined by spaces.
"""

from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path
from typing import Any

from data.base import fingerprint_of
from data.causal_text import CausalText, Loaded
from data.corpus import encoded
from data.documents import COLUMN, content_hash, demanded_files, read_texts
from data.hub import hub_rows
from data.token_cache import TokenCache
from data.wikitext_pages import pages_of, rows_of
from utils.rules import ExistingPath

HUB, CONFIGURATION = "Salesforce/wikitext", "wikitext-2-raw-v1"
DOCUMENT_PROTOCOL = "lm-eval/wikitext@v2"


@dataclass(frozen=True, kw_only=True)
class Wikitext2(CausalText):
    """WikiText-2, which waits for a tokenizer.

    Attributes:
        root: Folder with files of the train and the test split: the hub's parquet, the original
            `wiki.test.raw`, or plain text. None: the hub's `Salesforce/wikitext`.
    """

    root: ExistingPath | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in ("train", "test") if self.root is not None else ():
            self.files(split)

    @property
    def name(self) -> str:
        """As the data set is called."""
        return "wikitext2"

    def identity(self) -> str:
        """Hash of the files, or of the hub's rows."""
        if self.root is not None:
            return content_hash([*self.files("train"), *self.files("test")])
        return fingerprint_of(*(text for split in ("train", "test") for text in (split, *self.rows(split))))

    def files(self, split: str) -> list[Path]:
        """Local files of a split.

        Raises:
            InputError: If there are none.
        """
        return demanded_files(Path(str(self.root)), (split,))

    def rows(self, split: str) -> list[str]:
        """Rows of a split as the hub has them: lines with their line end, blank ones empty."""
        if self.root is None:
            found = hub_rows(HUB, CONFIGURATION, split, {COLUMN}, "data=wikitext2", "data.root=<folder with its files>")
            return [row[COLUMN] for row in found]
        return [
            row
            for path in self.files(split)
            for text in read_texts(path)
            for row in (rows_of(text) if path.suffix in (".txt", ".raw") else [text])
        ]

    def load(self, tokenizer: Any, cache: TokenCache) -> Loaded:
        """Both splits tokenised once: training rows joined by spaces, test rows by blank lines."""
        rows = memoised(self.rows)
        train = cache.part("train", lambda: encoded(tokenizer, " ".join(rows("train"))))
        return Loaded(
            name="wikitext2-test",
            train=train,
            windows=self.stream_windows(train),
            measured=cache.part("measured", lambda: encoded(tokenizer, "\n\n".join(rows("test")))),
            documents=lambda: pages_of(rows("test")),
            document_protocol=DOCUMENT_PROTOCOL,
        )


wikitext2 = Wikitext2
