"""Compile ``scan.c`` for the processor at hand, once, and load it.

The library goes into logitlab's cache under a name that holds the source, the compiler, its flags and the
processor, so another processor or another version makes its own; and its own content, so that a file which a crash has
cut off is seen. It appears in one step. Where there is no
compiler, or it fails, `library` gives None and `reason` says why; logitlab then works on PyTorch alone.

Set ``LOGITLAB_NATIVE=0`` to do without, and ``CC`` to name a compiler, with arguments if it takes some
(``CC="ccache gcc"``).

What is loaded runs as the user, so the folder and the file have to be the user's own, and nobody else may write there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
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
ABI = 3
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
    *((name, ctypes.c_double) for name in ("scale", "softcap")),
    *((name, ctypes.c_float) for name in ("theta", "theta_ref", "patience")),
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
        expect: ``int (struct job *, mean, lse)``.
        rounding: ``double (d, whether in bfloat16)``, by how much a logit is off at most, by |scale| |x| |w|.
        panel: rows that are worked on together.
        columns: columns that a product takes at once.
        bfloat16: whether the processor multiplies bfloat16.
        path: the file.
    """

    scan: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    logits_at: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    sizes: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    means: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    expect: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    rounding: ctypes._NamedFuncPointer  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
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
    try:
        compiler = _compiler()
        if compiler is None:
            return _none("there is no C compiler (cc, gcc or clang; or name one with CC)")
        path = _built(compiler)
        try:
            return _load(path), None
        except OSError:  # it may need something that is no longer there, such as another C library: once more
            if path.exists() and not os.access(path, os.X_OK):  # nothing may be run from that folder
                raise
            path.unlink(missing_ok=True)
            return _load(_built(compiler)), None
    except (OSError, ValueError, subprocess.SubprocessError, RuntimeError, AttributeError) as error:
        return _none(f"{type(error).__name__}: {' '.join(str(getattr(error, 'stderr', None) or error).split())[:300]}")


def _none(why: str) -> tuple[None, str]:
    """No kernel, which is said once."""
    log.warning("the compiled kernel cannot be had, so PyTorch alone is used, which is slower (%s)", why)
    return None, why


def _compiler() -> list[str] | None:
    """The compiler and what it is called with before anything else."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    return None


def _processor() -> str:
    """What tells one kind of processor from another, for code that was made for it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            head = file.read(8192).split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()} {_brand()}"
    kept = [
        line for line in head.splitlines() if line.split("\t")[0] in ("flags", "Features", "model name", "CPU part")
    ]
    return f"{platform.machine()} {kept}"


def _brand() -> str:
    """The processor's name on macOS, where there is no /proc and `platform` tells only its family."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""


def _built(compiler: list[str]) -> Path:
    """The library's file, made if it is not there."""
    source = SOURCE.read_bytes()
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = [*FLAGS, tune]
    programs = [found for found in map(shutil.which, compiler) if found]  # of "ccache gcc", both
    stats = [Path(program).resolve().stat() for program in programs]
    key = repr((source, flags, compiler, [(s.st_size, int(s.st_mtime)) for s in stats], _processor()))
    folder = cache_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)
    name = f"scan-{_digest(key.encode())}"
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process has taken it away
            continue
        if path.stem == f"{name}-{_digest(content)}":
            return path
        path.unlink(missing_ok=True)  # cut off: loading it could end the process, and not with an error
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as made:
        out = Path(made) / "scan.so"
        command = [*compiler, *flags, "-o", str(out), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS)  # noqa: S603
        out.chmod(0o700)
        return out.replace(folder / f"{name}-{_digest(out.read_bytes())}.so")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _check_own(path: Path) -> None:
    """Raise where others could put code of theirs."""
    stat = path.stat()
    if stat.st_uid != os.getuid():
        raise RuntimeError(f"{path} belongs to another user; remove it, or set LOGITLAB_CACHE to a folder of your own")
    if stat.st_mode & 0o022:
        raise RuntimeError(f"{path} can be written by others; remove it, or take that away (chmod go-w)")


def _load(path: Path) -> Library:
    _check_own(path)
    loaded = ctypes.CDLL(str(path))
    facts = (_INT * 5)()
    loaded.logitlab_facts(facts)
    if (facts[0], facts[1]) != (ABI, ctypes.sizeof(Job)):
        raise RuntimeError(f"{path} is of another version; remove it")
    loaded.logitlab_scan.argtypes = [ctypes.POINTER(Job)]
    loaded.logitlab_logits_at.argtypes = [ctypes.POINTER(Job), _POINTER, _INT, _POINTER]
    loaded.logitlab_sizes.argtypes = [ctypes.POINTER(Job), _POINTER, _POINTER]
    loaded.logitlab_means.argtypes = [ctypes.POINTER(Job), _POINTER, _POINTER]
    loaded.logitlab_expect.argtypes = [ctypes.POINTER(Job), _POINTER, _POINTER]
    loaded.logitlab_rounding.argtypes = [_INT, _INT]
    loaded.logitlab_rounding.restype = ctypes.c_double
    calls = (
        loaded.logitlab_scan,
        loaded.logitlab_logits_at,
        loaded.logitlab_sizes,
        loaded.logitlab_means,
        loaded.logitlab_expect,
    )
    return Library(*calls, loaded.logitlab_rounding, facts[2], facts[3], bool(facts[4]), path)
