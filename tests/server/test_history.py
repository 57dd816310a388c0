"""Past requests: what is kept, who may read it, what becomes of damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from logitlab.errors import InputError
from logitlab.server import history
from logitlab.server.history import History, default_folder
from tests.server.conftest import Shelf, settings
from tests.server.running import Running, running

READ: dict[str, Any] = {"do": "read", "model": "tiny", "prompt": {"text": "The capital"}}


def test_what_is_added_comes_back_newest_first(tmp_path: Path) -> None:
    kept = History(tmp_path / "deep" / "history")
    for n in range(3):
        assert kept.add("read", f"title {n}", {"n": n}) is None
    entries, notes = kept.entries()
    assert notes == []
    assert [(e["do"], e["title"], e["request"]) for e in entries] == [
        ("read", f"title {n}", {"n": n}) for n in (2, 1, 0)
    ]
    assert all(set(e) == {"id", "when", "do", "title", "request"} for e in entries)
    assert entries[0]["when"].endswith("+00:00")
    assert History(tmp_path / "deep" / "history").entries() == (entries, [])


def test_what_is_asked_again_is_kept_once(tmp_path: Path) -> None:
    kept = History(tmp_path / "history")
    for n in (0, 1, 1, 1, 0):  # only what was asked just before
        kept.add("read", str(n), {"n": n})
    assert [e["request"]["n"] for e in kept.entries()[0]] == [0, 1, 0]


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    kept = History(tmp_path / "history")
    kept.add("read", "t", {})
    (file,) = (tmp_path / "history").iterdir()
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_deleting(tmp_path: Path) -> None:
    kept = History(tmp_path / "history")
    for n in range(3):
        kept.add("read", str(n), {"n": n})
    other = tmp_path / "history" / "notes.txt"
    other.write_text("mine")
    entries, _ = kept.entries()
    assert kept.delete(entries[1]["id"])
    assert not kept.delete(entries[1]["id"])
    assert [e["title"] for e in kept.entries()[0]] == ["2", "0"]
    for strange in ("../notes", "..%2fnotes", "notes", "", "/etc/passwd", f"{entries[0]['id']}/", "*"):
        assert not kept.delete(strange)
    assert kept.clear() == 2
    assert kept.entries() == ([], [])
    assert other.read_text() == "mine"


def test_damaged_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = History(tmp_path / "history")
    kept.add("read", "good", {})
    damaged = {
        "0" * 20 + "-00000000.json": b"",
        "0" * 20 + "-00000001.json": b"{",
        "0" * 20 + "-00000002.json": b"\xff\xff",
        "0" * 20 + "-00000003.json": b"[1]",
        "0" * 20 + "-00000004.json": b'{"when": "x", "do": "read", "title": 3, "request": {}}',
        "0" * 20 + "-00000005.json": b'{"when": "x", "do": "read", "title": "t", "request": {"a": NaN}}',
        "0" * 20 + "-00000006.json": b"[" * 100_000,
        "0" * 20 + "-00000008.json": b'{"when": "x", "do": "read", "title": "\\ud800", "request": {}}',
    }
    for name, content in damaged.items():
        (tmp_path / "history" / name).write_bytes(content)
    (tmp_path / "history" / ("0" * 20 + "-00000007.json")).mkdir()
    entries, notes = kept.entries()
    assert [e["title"] for e in entries] == ["good"]
    assert notes == ["8 damaged entries were left out"]
    kept.entries()
    assert caplog.text.count("is damaged") == 8  # each is told once
    assert kept.clear() == 9


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ENTRIES", 3)
    kept = History(tmp_path / "history")
    for n in range(5):
        kept.add("read", str(n), {"n": n})
    assert [e["title"] for e in kept.entries()[0]] == ["4", "3", "2"]
    monkeypatch.setattr(history, "TOTAL_BYTES", 900)
    kept.add("read", "5", {"x": "y" * 700})
    assert [e["title"] for e in kept.entries()[0]] == ["5", "4"]
    monkeypatch.setattr(history, "ENTRY_BYTES", 200)
    assert kept.add("read", "6", {"x": "y" * 700}) == "this request is too large for the history"
    assert not [e for e in kept.entries()[0] if e["title"] == "6"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .* for the history: "):
        History(tmp_path / "file" / "history")
    with pytest.raises(InputError, match="cannot make the folder"):
        History(tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="no permission; give another folder"):
        History(tmp_path / "history")


def test_folders_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "history"
    History(folder)
    for mode in (0o720, 0o702, 0o777):
        folder.chmod(mode)
        with pytest.raises(InputError, match=r"others may write in the folder .*history: give another folder"):
            History(folder)
    folder.chmod(0o755)
    History(folder)
    user = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    with pytest.raises(InputError, match=r"the folder .*history belongs to another user"):
        History(folder)


def test_two_servers_with_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = History(tmp_path / "history"), History(tmp_path / "history")
    seen: list[Any] = []
    fsync = os.fsync

    def looks(handle: int) -> None:  # the other one looks while the first has not written yet
        seen.append((other.entries(), [p.stat().st_mode & 0o777 for p in (tmp_path / "history").iterdir()]))
        fsync(handle)

    monkeypatch.setattr("os.fsync", looks)
    assert one.add("read", "first", {}) is None
    assert seen == [(([], []), [0o600])]
    assert [e["title"] for e in other.entries()[0]] == ["first"]
    # What the other one deletes in the meantime costs nothing.
    paths = one._paths()
    (other_path,) = paths
    monkeypatch.setattr(one, "_paths", lambda: [*paths, tmp_path / "history" / "gone.json"])
    assert one.add("read", "second", {}) is None
    assert other_path.exists()


def test_where_it_is_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "logitlab" / "history"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert default_folder() == Path.home() / ".local" / "state" / "logitlab" / "history"


# -- over the protocol ---------------------------------------------------------------------------------


def test_requests_are_kept_and_can_be_sent_again(recorded: Running) -> None:
    assert recorded.client.get("/api/about").json()["history"] is True
    recorded.result({"do": "load", "model": "tiny"})
    first = recorded.result(READ)
    recorded.error(READ | {"sites": ["nonsense"]})
    recorded.result(READ | {"do": "compare", "other": {"prompt": {"text": "</script>"}}})
    answer = recorded.client.get("/api/history").json()
    assert answer["notes"] == []
    assert [(e["do"], e["title"]) for e in answer["entries"]] == [("compare", "The capital"), ("read", "The capital")]
    assert answer["entries"][0]["request"]["other"] == {"prompt": {"text": "</script>"}}
    again = recorded.result(answer["entries"][1]["request"])
    assert again["grids"][0]["data"]["prompts"] == first["grids"][0]["data"]["prompts"]


def test_deleting_over_the_protocol(recorded: Running, tmp_path: Path) -> None:
    recorded.result(READ)
    (entry,) = recorded.client.get("/api/history").json()["entries"]
    for strange in ("..", "%2e%2e%2fhistory", "x"):
        assert recorded.client.delete(f"/api/history/{strange}").status_code == 404
    assert recorded.client.delete(f"/api/history/{entry['id']}").json() == {"deleted": 1}
    assert recorded.client.delete(f"/api/history/{entry['id']}").status_code == 404
    recorded.result(READ)
    assert recorded.client.delete("/api/history").json() == {"deleted": 1}
    assert recorded.client.get("/api/history").json() == {"entries": [], "notes": []}


def test_a_history_that_cannot_be_written_costs_nothing_but_itself(
    recorded: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = recorded.result(READ)
    assert result["notes"] == ["the history could not be written; the server's terminal says why"]
    assert len(result["grids"]) == 1
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "history").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "history").rename(tmp_path / "gone")
    assert len(recorded.result(READ)["notes"]) == 1
    assert recorded.client.get("/api/history").json() == {"entries": [], "notes": []}


def test_a_damaged_entry_does_not_hide_the_others(recorded: Running, tmp_path: Path) -> None:
    recorded.result(READ)
    entry = {"when": "x", "do": "read", "title": "\ud800", "request": {}}
    (tmp_path / "history" / ("0" * 20 + "-00000000.json")).write_text(json.dumps(entry))
    found = recorded.client.get("/api/history").json()
    assert [e["title"] for e in found["entries"]] == ["The capital"]
    assert found["notes"] == ["1 damaged entry was left out"]


def test_no_history(app: Running) -> None:
    assert app.client.get("/api/about").json()["history"] is False
    for method, path in (("GET", "/api/history"), ("DELETE", "/api/history"), ("DELETE", "/api/history/x")):
        answer = app.client.request(method, path)
        assert (answer.status_code, answer.json()) == (404, {"message": "this server keeps no history"})


def test_a_history_in_a_file_is_refused_at_the_start(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="for the history"), running(settings(shelf, history=tmp_path / "file")):
        pass
