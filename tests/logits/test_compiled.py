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


def test_a_failure_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(monkeypatch, tmp_path, "failing compiler")
    with caplog.at_level("WARNING", logger="logitlab"):
        for _ in range(3):
            compiled.library()
    assert len(caplog.records) == 1
    assert "PyTorch alone is used, which is slower" in caplog.text


def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    """It would run their code: whoever can write the file can put anything into it."""
    lib = compiled.library()
    assert lib is not None
    lib.path.chmod(lib.path.stat().st_mode | stat.S_IWOTH)
    compiled._found.cache_clear()
    assert compiled.library() is None
    assert "can be written by others" in str(compiled.reason())


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
