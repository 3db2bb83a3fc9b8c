"""Any folder of plain text: `train*.txt`, and `validation*.txt` or `test*.txt`."""

from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path
from typing import Any

from data.causal_text import CausalText, Loaded
from data.corpus import Document, stream_of
from data.documents import content_hash, demanded_files, read_texts
from data.token_cache import TokenCache
from utils.errors import InputError
from utils.rules import ExistingPath

HELD_OUT = ("validation", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class TextFolder(CausalText):
    """A folder that waits for a tokenizer.

    Attributes:
        root: The folder. Every file is a document, or several where `separator` stands in it.
        separator: What stands between documents of one file; None: nothing does.
    """

    root: ExistingPath
    separator: str | None = "<|endoftext|>"

    def __post_init__(self) -> None:
        super().__post_init__()
        for names in (("train",), HELD_OUT):
            self.files(names)

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(self.root).name

    @property
    def settings(self) -> dict[str, Any]:
        """What stands between documents."""
        return {"separator": self.separator}

    def identity(self) -> str:
        """Hash of the files."""
        return content_hash([*self.files(("train",)), *self.files(HELD_OUT)])

    def files(self, names: tuple[str, ...]) -> list[Path]:
        """Files of a split.

        Raises:
            InputError: If there are none.
        """
        return demanded_files(Path(self.root), names, (".txt",))

    def documents(self, names: tuple[str, ...]) -> list[str]:
        """Documents of a split without the white space around them, in the order of their files.

        Raises:
            InputError: If there are none.
        """
        texts = [text for path in self.files(names) for text in read_texts(path)]
        parts = [part.strip() for text in texts for part in (text.split(self.separator) if self.separator else [text])]
        if not (found := [part for part in parts if part]):
            raise InputError(f"data.root={self.root}: the files of {names[0]} hold no text")
        return found

    def load(self, tokenizer: Any, cache: TokenCache) -> Loaded:
        """Every document tokenised by itself; windows are of the stream of training documents."""
        documents, name = memoised(self.documents), f"{self.name}-validation"
        train = cache.part("train", lambda: stream_of(tokenizer, documents(("train",))))
        return Loaded(
            name=name,
            train=train,
            windows=self.stream_windows(train),
            measured=cache.part("measured", lambda: stream_of(tokenizer, documents(HELD_OUT))),
            documents=lambda: [Document(text, text) for text in documents(HELD_OUT)],
            document_protocol=f"{name}/documents",
        )


text_folder = TextFolder
