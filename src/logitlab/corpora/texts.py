"""Texts from wherever they are: files, folders, tables, datasets, lists, standard input; always in the same order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitlab.errors import InputError

PLAIN = (".txt", ".md", ".rst", ".text")
TABLES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Text:
    """One text of a corpus.

    Attributes:
        text: its characters.
        place: where it comes from, for messages: file and row.
        columns: other columns of its row.
    """

    text: str
    place: str
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Corpus:
    """Texts that can be gone through again and again, each time in the same order.

    Made by `corpus`.

    Attributes:
        name: what it is called in records.
    """

    def __init__(self, name: str, rows: Any, column: str) -> None:
        self.name = name
        self._rows = rows
        self._column = column

    def __iter__(self) -> Iterator[Text]:
        count = 0
        for place, row in self._rows():
            count += 1
            if isinstance(row, str):
                yield Text(_sound(row, place), place)
                continue
            if self._column not in row:
                has = ", ".join(map(str, row)) or "none"
                raise InputError(f"{place} has no column {self._column!r}; its columns are {has}: name one as column=")
            text = row[self._column]
            if not isinstance(text, str):
                raise InputError(f"{place}: column {self._column!r} is a {type(text).__name__}, not a text")
            yield Text(_sound(text, place), place, {k: v for k, v in row.items() if k != self._column})
        if count == 0:
            raise InputError(f"the corpus {self.name} is empty: it has no text")


def corpus(source: Any, *, column: str = "text") -> Corpus:
    """A corpus from what a caller has.

    Args:
        source: a `Corpus`; a list of texts, or of mappings; a text file (one text), a ``.jsonl`` or ``.parquet`` file
            (a text a row), a folder of such files, gone through in the order of their names; ``"-"`` for standard
            input, a text a line; a dataset of the library ``datasets``, streaming or not; ``"books"``, which is fetched
            (see `logitlab.corpora.fetch_corpus`).
        column: which column of a table is the text.

    Raises:
        InputError: there is no such file, or it is of another form; while it is read also: a row without that
            column, a row that is no JSON object, no text at all.

    Example:
        >>> " ".join(text.text for text in corpus(["one", "two"]))
        'one two'
    """
    if isinstance(source, Corpus):
        return source
    if isinstance(source, str) and source == "-":
        lines = _standard_input()
        return Corpus("standard input", lambda: lines, column)
    if isinstance(source, str | Path):
        return _from_path(Path(source).expanduser(), column)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise InputError(
            f"a corpus cannot be made from a {type(source).__name__}; give a file, a folder, texts, or a dataset"
            + (" split, for instance dataset['train']" if isinstance(source, Mapping) else "")
        )
    items: Any = source
    if isinstance(source, Iterator):
        items = list(source)  # it is gone through more than once
    name = str(getattr(getattr(source, "info", None), "dataset_name", None) or type(source).__name__)
    return Corpus(name, lambda: _numbered(f"{name}, row", items), column)


def _sound(text: str, place: str) -> str:
    """The text, if it is one: half a surrogate pair cannot be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} has half a character (a surrogate at {error.start}): mend that text") from error
    return text


def _standard_input() -> list[tuple[str, str]]:
    """Lines of standard input with their numbers, from 1; empty ones are left out."""
    raw = getattr(sys.stdin, "buffer", None)
    try:
        text = sys.stdin.read() if raw is None else raw.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    numbered = enumerate(text.splitlines(), 1)
    return [(f"standard input, line {n}", line) for n, line in numbered if line.strip()]


def _numbered(what: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for n, row in enumerate(rows):
        if not isinstance(row, str | Mapping):
            raise InputError(f"{what} {n} is a {type(row).__name__}; a corpus has texts, or rows with columns")
        yield f"{what} {n}", row


def _from_path(path: Path, column: str) -> Corpus:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in PLAIN + TABLES)
        if not files:
            raise InputError(f"the folder {path} has no file that ends in {', '.join(PLAIN + TABLES)}")
        return Corpus(str(path), lambda: (row for file in files for row in _file(file)), column)
    if not path.is_file():
        from logitlab.corpora.demo import CORPORA, fetch_corpus

        if str(path) in CORPORA:
            file = fetch_corpus(str(path))
            return Corpus(str(path), lambda: _file(file), column)
        raise InputError(
            f"there is no corpus at {path}: no such file or folder, nor one that can be fetched ({', '.join(CORPORA)})"
        )
    return Corpus(str(path), lambda: _file(path), column)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of one file with where they are."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path)
        return
    try:
        if kind in TABLES:
            with path.open(encoding="utf-8-sig") as lines:
                for n, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}:{n}", _object(line, f"{path}:{n}")
        else:
            text = path.read_text(encoding="utf-8-sig")
            if text.strip():
                yield str(path), text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _object(line: str, place: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON that can be read: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, str | dict):
        raise InputError(f"{place} is neither a JSON object nor a text")
    return row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        n = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}, row {n}", row
                n += 1
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:160]}") from error
