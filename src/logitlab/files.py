"""Where logitlab keeps its files, and how they are written: a reader finds the old content or the new one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitlab.errors import InputError


def cache_folder() -> Path:
    """``$LOGITLAB_CACHE``, else ``logitlab`` in the user's cache folder."""
    own = os.environ.get("LOGITLAB_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "logitlab"


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place in one step.

    Args:
        path: the file to create or replace; its folder must exist.
        write: called with the temporary path.

    Returns:
        The path.

    Raises:
        InputError: the folder is missing or not writable, ``path`` is a folder, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
    except Exception as error:
        # A full disk under safetensors is no OSError; its class is known by name, since not everybody has loaded it.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise InputError(
            f"cannot write {path}: {why}; what was there before is unchanged, give another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


@contextmanager
def locked(path: Path, work: str) -> Generator[None]:
    """Keep others from the same work while a ``with`` block lasts; the system lets go when the process ends.

    Where the system or the file system has no locks there is none.

    Args:
        path: the file to lock, which holds the number of the process; its folder must exist.
        work: what is kept to one, in a word: ``sweep``, ``run``.

    Raises:
        InputError: another process is at it, or the file cannot be written.
    """
    try:
        file = path.open("a+", encoding="ascii")
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cannot write in {path.parent}: {why}; give another folder") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                whose = file.read().strip()
                who = f"another {work} (process {whose})" if whose else f"another {work}"
                raise InputError(f"{who} is at work in {path.parent}: wait for it, or give another folder") from error
            # else a file system without locks
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_writable(path: str | Path) -> None:
    """Raise `InputError` if `write_atomically` could not write ``path``, as far as can be told before."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is a device or a pipe; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {path.parent}; give another folder")


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text with `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def difference(its: Any, mine: Any) -> str:
    """How a record that was found differs from one that was expected, in words."""
    if isinstance(its, dict) and isinstance(mine, dict):
        names = [name for name in {**its, **mine} if its.get(name) != mine.get(name)]
        pairs = [(f"{name}: ", its.get(name), mine.get(name)) for name in names[:2]]
    else:
        pairs = [("", its, mine)]
    return ", ".join(f"{name}{str(a)[:40]} there, {str(b)[:40]} here" for name, a, b in pairs)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
