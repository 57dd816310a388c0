"""Compile ``scan.c`` for the processor at hand, once, and load it.

The library goes into logitlab's cache under a name that holds the source, the compiler, its flags and the
processor, so another processor or another version makes its own. It appears in one step. Where there is no
compiler, or it fails, `library` gives None and `reason` says why; logitlab then works on PyTorch alone.

Set ``LOGITLAB_NATIVE=0`` to do without, and ``CC`` to name a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from logitlab.files import cache_folder

log = logging.getLogger("logitlab")

SOURCE = Path(__file__).with_name("scan.c")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
    "-pthread",
)
ABI = 1
SECONDS = 120
"""Time that the compiler gets."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64

FIELDS: tuple[tuple[str, type], ...] = (
    *((name, _INT) for name in ("n", "d", "columns", "first")),
    ("x", _POINTER),
    ("w", _POINTER),
    ("ldw", _INT),
    *(
        (name, _POINTER)
        for name in ("bias", "offset", "allowed", "w_size", "w_lost", "bound", "order", "blocks", "place")
    ),
    *((name, _POINTER) for name in ("ref_first", "ref_count", "ref_counts", "ref", "ref_lse", "ref_ids")),
    *((name, _POINTER) for name in ("target_ids", "target_z")),
    *((name, _INT) for name in ("n_blocks", "n_ref", "ref_keep", "targets", "keep", "keep_ranked")),
    *((name, _INT) for name in ("slices", "tile", "threads")),
    *((name, ctypes.c_float) for name in ("scale", "softcap", "theta", "theta_ref", "patience")),
    *((name, ctypes.c_int32) for name in ("w_type", "mode")),
    *((name, _POINTER) for name in ("max", "sum", "moment", "cross", "tail", "tail_moment", "tail_cross", "mass")),
    *((name, _POINTER) for name in ("best_z", "ranked_z", "best_id", "ranked_id", "before", "most", "again")),
)
"""The members of ``struct job`` in scan.c, in order."""


class Job(ctypes.Structure):
    """What a scan is told; see ``struct job`` in scan.c."""

    _fields_ = FIELDS  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class Library:
    """The loaded kernel.

    Attributes:
        scan: ``int (struct job *)``.
        logits_at: ``int (struct job *, ids, per_row, out)``.
        sizes: ``int (struct job *, size, lost)``.
        means: ``int (struct job *, mean, mass)``.
        panel: rows that are worked on together.
        columns: columns that a product takes at once.
        bfloat16: whether the processor multiplies bfloat16.
        path: the file.
    """

    scan: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    logits_at: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    sizes: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    means: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    panel: int
    columns: int
    bfloat16: bool
    path: Path


def library() -> Library | None:
    """The kernel, compiled if it has not been; None where that is not possible."""
    return _found()[0]


def reason() -> str | None:
    """Why there is no kernel, or None where there is one."""
    return _found()[1]


@functools.cache
def _found() -> tuple[Library | None, str | None]:
    if os.environ.get("LOGITLAB_NATIVE", "1") == "0":
        return None, "LOGITLAB_NATIVE is 0"
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang; or name one with CC)"
    try:
        return _load(_built(compiler)), None
    except (OSError, subprocess.SubprocessError, RuntimeError, AttributeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(getattr(error, 'stderr', None) or error).split())[:300]}"
        log.warning("the compiled kernel cannot be had, so PyTorch alone is used, which is slower (%s)", why)
        return None, why


def _compiler() -> str | None:
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    return None


def _processor() -> str:
    """What tells one kind of processor from another, for code that was made for it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            head = file.read(8192).split("\n\n")[0]
    except OSError:
        head = platform.processor()
    kept = [
        line for line in head.splitlines() if line.split("\t")[0] in ("flags", "Features", "model name", "CPU part")
    ]
    return f"{platform.machine()} {kept}"


def _built(compiler: str) -> Path:
    """The library's file, made if it is not there."""
    source = SOURCE.read_bytes()
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = [*FLAGS, tune]
    stat = Path(compiler).resolve().stat()
    key = repr((source, flags, compiler, stat.st_size, int(stat.st_mtime), _processor()))
    folder = cache_folder() / "native"
    path = folder / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as made:
        out = Path(made) / "scan.so"
        command = [compiler, *flags, "-o", str(out), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603
        out.chmod(0o700)
        out.replace(path)
    return path


def _load(path: Path) -> Library:
    stat = path.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise RuntimeError(f"{path} can be written by others, or is theirs; remove it")
    loaded = ctypes.CDLL(str(path))
    facts = (_INT * 5)()
    loaded.logitlab_facts(facts)
    if (facts[0], facts[1]) != (ABI, ctypes.sizeof(Job)):
        raise RuntimeError(f"{path} is of another version; remove it")
    loaded.logitlab_scan.argtypes = [ctypes.POINTER(Job)]
    loaded.logitlab_logits_at.argtypes = [ctypes.POINTER(Job), _POINTER, _INT, _POINTER]
    loaded.logitlab_sizes.argtypes = [ctypes.POINTER(Job), _POINTER, _POINTER]
    loaded.logitlab_means.argtypes = [ctypes.POINTER(Job), _POINTER, _POINTER]
    calls = loaded.logitlab_scan, loaded.logitlab_logits_at, loaded.logitlab_sizes, loaded.logitlab_means
    return Library(*calls, facts[2], facts[3], bool(facts[4]), path)
