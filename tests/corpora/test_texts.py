"""Corpora: the same texts in the same order from every form, and one clear line for what is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitlab.corpora import corpus
from logitlab.corpora.demo import _rows
from logitlab.errors import InputError

ROWS = [{"text": "one", "lang": "en"}, {"text": "zwei\n\nDrei", "lang": "de"}, {"text": "", "lang": "xx"}]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: ROWS,
        lambda folder: jsonl(folder / "a.jsonl", ROWS),
        lambda folder: str(parquet(folder / "a.parquet", ROWS)),
        lambda folder: iter(ROWS),
        lambda folder: corpus(ROWS),
    ],
)
def test_rows_come_from_every_form(form: Callable[[Path], Any], tmp_path: Path) -> None:
    texts = corpus(form(tmp_path))
    for _ in range(2):  # it can be gone through again
        found = list(texts)
        assert [t.text for t in found] == [row["text"] for row in ROWS]
        assert [t.columns for t in found] == [{"lang": row["lang"]} for row in ROWS]


def test_a_folder_is_gone_through_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("third", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [t.text for t in corpus(tmp_path)] == ["first", "second", "third"]


def test_standard_input_has_a_text_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    texts = corpus("-")
    assert [t.text for t in texts] == ["one", "two"]
    assert [t.text for t in texts] == ["one", "two"]


def test_standard_input_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n\xef\xbb\xbftwo\n")))
    assert [t.place for t in corpus("-")] == ["standard input, line 1", "standard input, line 3"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe the sea\n")))
    with pytest.raises(InputError, match=r"standard input is not UTF-8 text \(byte 0\)"):
        corpus("-")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert [t.text for t in corpus(tmp_path)] == ["one", "two"]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    def said(source: Any, match: str, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            list(corpus(source, **options))

    said([], "is empty")
    said(tmp_path / "no", "there is no corpus at .*no: no such file or folder, nor one that can be fetched")
    said(tmp_path, "has no file that ends in .txt")
    said(7, "cannot be made from a int")
    said({"train": ROWS}, r"dataset\['train'\]")
    said([1, 2], "row 0 is a int")
    said(ROWS, "has no column 'body'; its columns are text, lang", column="body")
    said([{"text": 5}], "column 'text' is a int, not a text")
    broken = tmp_path / "x.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    said(broken, r"x\.jsonl:2 is not JSON")
    broken.write_text("[" * 100_000 + "\n", encoding="utf-8")
    said(broken, r"x\.jsonl:1 is not JSON that can be read")
    broken.write_text('{"text": "the \\ud800 sea"}\n', encoding="utf-8")
    said(broken, "has half a character")
    broken.write_text("[1]\n", encoding="utf-8")
    said(broken, r"x\.jsonl:1 is neither a JSON object nor a text")
    broken.write_bytes(b'{"text": "\xff"}\n')
    said(broken, "cannot be read as UTF-8")
    (tmp_path / "y.parquet").write_bytes(b"PAR1nothing")
    said(tmp_path / "y.parquet", "cannot be read as Parquet")


def test_the_books_take_turns() -> None:
    book = "  ".join(f"Paragraph {n} " + "x" * 300 for n in range(20))
    rows = list(_rows("\n".join([book] * 17)))
    assert len({row["book"] for row in rows}) == 9
    assert [row["piece"] for row in rows[:9]] == [0] * 9
    assert all(len(str(row["text"])) >= 2000 for row in rows[:9])
    first = [row["text"] for row in rows if row["book"] == "Frankenstein"]
    assert "\n\n".join(map(str, first)).replace("\n\n", "  ") == book
