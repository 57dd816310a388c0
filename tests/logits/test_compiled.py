"""Compiling, caching and doing without the kernel."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from logitlab.errors import InputError
from logitlab.logits import compiled, statistics
from logitlab.logits.choose import choose, why_not
from tests.logits.common import assert_same, random_head, random_rows


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing remembered."""
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    compiled._found.cache_clear()
    yield
    compiled._found.cache_clear()


def built(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "native").iterdir())


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = compiled.library()
    assert lib is not None
    assert compiled.reason() is None
    assert built(tmp_path) == [lib.path]
    compiled._found.cache_clear()

    def never(*args: object, **options: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    again = compiled.library()
    assert again is not None
    assert again.path == lib.path


@pytest.mark.parametrize("change", ["source", "flags", "processor"])
def test_another_source_or_processor_has_its_own(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled.library()
    compiled._found.cache_clear()
    if change == "source":
        other = tmp_path / "other.c"
        other.write_text(compiled.SOURCE.read_text() + "/* changed */\n")
        monkeypatch.setattr(compiled, "SOURCE", other)
    elif change == "flags":
        monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DNOTHING"))
    else:
        monkeypatch.setattr(compiled, "_processor", lambda: "another")
    second = compiled.library()
    assert first is not None
    assert second is not None
    assert first.path != second.path
    assert len(built(tmp_path)) == 2


def test_processors_started_together_do_not_spoil_it(tmp_path: Path) -> None:
    code = "from logitlab.logits.compiled import library; print(library().panel)"
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(3)
    ]
    assert len({p.communicate(timeout=120)[0] for p in many}) == 1
    assert all(p.returncode == 0 for p in many)
    assert len(built(tmp_path)) == 1


def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> str:
    """Take the kernel away; the reason that is given."""
    if how == "switched off":
        monkeypatch.setenv("LOGITLAB_NATIVE", "0")
        return "LOGITLAB_NATIVE is 0"
    if how == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
        return "there is no C compiler"
    if how == "failing compiler":
        script = tmp_path / "cc"
        script.write_text("#!/bin/sh\necho 'scan.c:1: no luck' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return "no luck"
    if how == "not a library":
        script = tmp_path / "cc"
        script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return "OSError"
    (tmp_path / "cache").write_text("a file where the folder should be")
    return "NotADirectoryError" if sys.version_info < (3, 12) else "Error"


HOWS = ["switched off", "no compiler", "failing compiler", "not a library", "no cache"]


@pytest.mark.parametrize("how", HOWS)
def test_without_it_everything_works(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only slower: PyTorch alone gives the same statistics, and the reason is kept."""
    head, x = random_head(700, 24), random_rows(2, 5, 24)
    with_it = statistics(x, head, targets=torch.tensor([3]), reference=x[1], backend="native")
    compiled._found.cache_clear()
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "empty" if how != "no cache" else tmp_path / "cache" / "x"))
    if how == "no cache":
        import shutil

        shutil.rmtree(tmp_path / "cache")
    why = without(monkeypatch, tmp_path, how)
    assert compiled.library() is None
    assert why in str(compiled.reason())
    assert choose("auto", head) == "tiled"
    assert_same(statistics(x, head, targets=torch.tensor([3]), reference=x[1]), with_it)
    with pytest.raises(InputError, match=r"the backend 'native' cannot decode this: .*; use backend='auto'"):
        statistics(x, head, backend="native")
    found = statistics(x, head, precision="screened")
    assert found.bound is not None
    assert not bool(found.bound.any())


@pytest.mark.parametrize("how", ["failing compiler", "no compiler"])
def test_a_failure_is_logged_once(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    why = without(monkeypatch, tmp_path, how)
    with caplog.at_level("WARNING", logger="logitlab"):
        for _ in range(3):
            compiled.library()
    assert len(caplog.records) == 1
    assert "PyTorch alone is used, which is slower" in caplog.text
    assert why in caplog.text


def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    """It would run their code: whoever can write the file can put anything into it."""
    lib = compiled.library()
    assert lib is not None
    lib.path.chmod(lib.path.stat().st_mode | stat.S_IWOTH)
    compiled._found.cache_clear()
    assert compiled.library() is None
    assert "can be written by others" in str(compiled.reason())


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    """They could put a library of theirs there."""
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert compiled.library() is None
    assert f"{folder} can be written by others; remove it, or take that away (chmod go-w)" in str(compiled.reason())
    assert not list(folder.iterdir())


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert compiled.library() is None
    assert "native belongs to another user; remove it, or set LOGITLAB_CACHE" in str(compiled.reason())


def test_its_folder_is_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        lib = compiled.library()
    finally:
        os.umask(before)
    assert lib is not None
    assert lib.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["cut off", "empty", "something else"])
def test_a_spoilt_library_is_made_again(how: str, tmp_path: Path) -> None:
    """A crash leaves such files. (In processes of their own: loading one could end this one.)"""
    code = "from logitlab.logits.compiled import library, reason; print(library() is not None, reason())"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "True None\n"
    (path,) = built(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut off": whole[:5000], "empty": b"", "something else": b"no library at all"}[how])
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "True None\n"
    assert built(tmp_path) == [path]
    assert path.read_bytes() == whole


def test_a_library_that_does_not_load_is_made_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is whole, but needs what is not there any more."""
    loads: list[Path] = []
    original = compiled._load

    def fails_once(path: Path) -> compiled.Library:
        loads.append(path)
        if len(loads) == 1:
            raise OSError("libc.so.7: cannot open shared object file")
        return original(path)

    monkeypatch.setattr(compiled, "_load", fails_once)
    made: list[object] = []
    run = subprocess.run

    def watched(*args: object, **options: object) -> object:
        made.append(args)
        return run(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", watched)
    assert compiled.library() is not None
    assert len(loads) == len(made) == 2


def test_doing_without_on_purpose_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(monkeypatch, tmp_path, "switched off")
    with caplog.at_level("WARNING", logger="logitlab"):
        assert compiled.library() is None
    assert not caplog.records


def test_a_compiler_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ccache gcc`, `env gcc`, `gcc -m64`: the way in which build tools take CC."""
    compiler = compiled._compiler()
    assert compiler is not None
    paths: list[Path] = []
    for named in (compiler[0], f"env {compiler[0]}", f"env '{compiler[0]}' -DNOTHING"):
        monkeypatch.setenv("CC", named)
        compiled._found.cache_clear()
        lib = compiled.library()
        assert lib is not None, compiled.reason()
        paths.append(lib.path)
    assert len(set(paths)) == 3


@pytest.mark.parametrize("named", ["gcc 'unfinished", " "])
def test_a_compiler_that_is_no_name(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", named)
    lib = compiled.library()
    assert (lib is not None) == (named == " ")
    assert lib is not None or "No closing quotation" in str(compiled.reason())


def test_a_compiler_that_speaks_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_bytes(b"#!/bin/sh\nprintf 'verr\\374ckt' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert compiled.library() is None
    assert "verr\ufffdckt" in str(compiled.reason())


def test_processors_of_a_mac_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no /proc, and `platform` says "arm" of all of them."""
    monkeypatch.setattr(compiled.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(compiled.platform, "processor", lambda: "arm")
    names = iter(["Apple M1\n", "Apple M4\n"])
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, stdout=next(names))
    )

    def none(self: Path, *args: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", none)
    first, second = compiled._processor(), compiled._processor()
    assert "Apple M1" in first
    assert "Apple M4" in second


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ABI", compiled.ABI + 1)
    assert compiled.library() is None
    assert "is of another version; remove it" in str(compiled.reason())


def test_what_the_kernel_cannot_take() -> None:
    head = random_head(30, 8)
    assert why_not("native", head) is None
    assert "torch.float64" in str(why_not("native", random_head(30, 8).__class__(head.weight.double())))
    assert "strides" in str(why_not("native", head.__class__(head.weight.T.contiguous().T)))
    meta = head.__class__(torch.empty(30, 8, device="meta"))
    assert why_not("native", meta) == "its head is on meta"
