"""Past requests, one JSON file each, in a folder that is the user's alone."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from logitlab.errors import InputError

ENTRIES = 500
"""Requests that are kept; the oldest ones go."""

ENTRY_BYTES = 1024 * 1024
"""Size of a request that is kept, with its pictures."""

TOTAL_BYTES = 16 * 1024 * 1024
"""Size of all of them together."""

_NAME = re.compile(r"[0-9]{20}-[0-9a-f]{8}")
_LOG = logging.getLogger("logitlab.server")


def default_folder() -> Path:
    """``logitlab/history`` in the folder for state of programs: ``$XDG_STATE_HOME``, else ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME")
    # The specification wants relative paths ignored.
    state = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "state"
    return state / "logitlab" / "history"


class History:
    """Past requests in a folder.

    Args:
        folder: is made, readable by its owner alone, if it is not there.

    Raises:
        InputError: it cannot be made or written, or it is another user's or writable by others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._told: set[str] = set()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {folder} for the history: {error.strerror}") from error
        _check_owner(folder)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"cannot write the history into {folder}: no permission; give another folder")

    def add(self, do: str, title: str, request: dict[str, Any]) -> str | None:
        """Keep a request; one that is asked again is kept once, as the newest.

        Args:
            do: its kind.
            title: what it is called in a list.
            request: plain values.

        Returns:
            Why it was not kept, in a sentence; None if it was.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        text = json.dumps({"when": now, "do": do, "title": title, "request": request})
        if len(text) > ENTRY_BYTES:
            return "this request is too large for the history"
        path = self.folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
        with self._lock:
            try:
                before = self._paths()[-1:]
                _write(path, text)
                for last in before:
                    if (self._read(last) or {}).get("request") == json.loads(text)["request"]:
                        self._unlink(last)
                self._prune()
            except (OSError, InputError) as error:
                _LOG.warning("the history was not written: %s", error)
                return "the history could not be written; the server's terminal says why"
        return None

    def entries(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What is kept, the newest first, and notes about what could not be read."""
        with self._lock:
            found: list[dict[str, Any]] = []
            bad = 0
            for path in reversed(self._paths()):
                entry = self._read(path)
                if entry is None:
                    bad += 1
                else:
                    found.append(entry)
        notes = [f"{bad} damaged {'entry was' if bad == 1 else 'entries were'} left out"] if bad else []
        return found, notes

    def delete(self, identity: str) -> bool:
        """Forget one request; says whether there was one.

        Raises:
            InputError: it cannot be deleted.
        """
        if not _NAME.fullmatch(identity):
            return False
        with self._lock:
            return self._unlink(self.folder / f"{identity}.json")

    def clear(self) -> int:
        """Forget all requests, damaged ones too; says how many.

        Raises:
            InputError: one cannot be deleted.
        """
        with self._lock:
            return sum(self._unlink(path) for path in self._paths())

    # -- files ---------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        """Our files, the oldest first."""
        try:
            return sorted(
                p for p in self.folder.iterdir() if p.suffix == ".json" and _NAME.fullmatch(p.stem) and p.is_file()
            )
        except OSError as error:
            _LOG.warning("the history cannot be read: %s", error)
            return []

    def _read(self, path: Path) -> dict[str, Any] | None:
        """One entry; None, with a line in the log, for what is none."""
        try:
            if path.stat().st_size > ENTRY_BYTES:
                raise ValueError("it is too large")
            held: Any = json.loads(path.read_text(encoding="utf-8"))
            found = {name: held[name] for name in ("when", "do", "title", "request")}
            kinds = {"when": str, "do": str, "title": str, "request": dict}
            if not all(isinstance(found[name], kind) for name, kind in kinds.items()):
                raise ValueError("it holds something else")
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # half characters cannot be sent
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if path.name not in self._told:
                self._told.add(path.name)
                _LOG.warning("%s in the history is damaged: %s", path.name, " ".join(str(error).split())[:200])
            return None
        return {"id": path.stem, **found}

    def _prune(self) -> None:
        """Delete what is too much, the oldest first."""
        total = 0
        for kept, path in enumerate(reversed(self._paths()), 1):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # another server has deleted it
                continue
            if kept > ENTRIES or total > TOTAL_BYTES:
                self._unlink(path)

    def _unlink(self, path: Path) -> bool:
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise InputError(f"the entry cannot be deleted: {error.strerror}") from error
        return True


def _check_owner(folder: Path) -> None:
    """Raise `InputError` if others could read or change what is kept in a folder."""
    if os.name != "posix":
        return
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise InputError(f"the folder {folder} belongs to another user: give another folder for the history")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"others may write in the folder {folder}: give another folder for the history, or chmod go-w {folder}"
        )


def _write(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, and that is never seen half written."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)  # 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
