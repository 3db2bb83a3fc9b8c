"""WikiText as rows, joined text and pages: pure functions of texts."""

import re
from collections.abc import Sequence

from data.corpus import Document

HEADING = re.compile(r" = [^=].*[^=] = \n")
ROW = re.compile(r"(?:[^\n]+\n)?")
BLANK_LINE = " \n"

# WikiText sets marks apart by spaces; this table takes that back in the order of its rows, as
# EleutherAI's task wikitext (version 2) does, so that figures compare
REPLACED = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
ENCLOSED = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"), (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"), (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)  # fmt: skip
LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def rows_of(text: str) -> list[str]:
    """Rows of the data set from a plain file of it: a line with its line end, or nothing for a blank line.

    The file may hold the original lines, or the rows joined by blank lines, which never follow a line
    in the original without a space of their own.
    """
    if "\n\n\n" not in text:
        return [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    rows, place = [], 0
    while (match := ROW.match(text, place)) is not None:
        rows.append(match.group())
        place = match.end()
        if not text.startswith("\n\n", place):
            break
        place += 2
    return rows


def pages_of(rows: Sequence[str]) -> list[Document]:
    """Pages, each from its heading on: raw as in the original file, and as a model reads them."""
    pages: list[str] = []
    for row in rows:
        if HEADING.fullmatch(row):
            pages.append("")
        if pages:
            pages[-1] += row or BLANK_LINE
    whole = [page.removesuffix("\n") for page in pages]
    return [Document(detokenized(page), page) for page in whole]


def detokenized(page: str) -> str:
    """A page with the spaces around its marks taken back."""
    for old, new in REPLACED:
        page = page.replace(old, new)
    for pattern, kept in ENCLOSED:
        page = pattern.sub(kept, page)
    for old, new in LAST:
        page = page.replace(old, new)
    return page
