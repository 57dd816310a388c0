"""Files are replaced in one step, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import logitlab as ll
from logitlab.files import check_writable, locked, write_atomically, write_text
from tests.commands import files


def told(path: Path) -> str:
    with pytest.raises(ll.InputError) as caught:
        check_writable(path)
    with pytest.raises(ll.InputError) as again:
        write_text(path, "x")
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def test_a_file_is_created_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert write_text(path, "one ä🧪\n") == path
    assert path.read_bytes() == "one ä🧪\n".encode()
    assert write_text(str(path), "two") == path
    assert path.read_text() == "two"
    assert files(tmp_path) == ["a.txt"]


def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        assert write_text(tmp_path / "new", "x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
    (tmp_path / "new").chmod(0o604)
    assert write_text(tmp_path / "new", "y").stat().st_mode & 0o777 == 0o604


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".a.txt.")
        assert temporary.suffix == ".part"
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "no" / "a.txt"
    assert told(missing) == f"cannot write {missing}: the folder {missing.parent} does not exist; make it first"
    assert told(tmp_path) == f"cannot write {tmp_path}: it is a folder; give a file name"
    file = write_text(tmp_path / "file", "x")
    assert told(file / "a") == f"cannot write {file / 'a'}: the folder {file} does not exist; make it first"
    assert told(Path("/dev/null")) == "cannot write /dev/null: it is a device or a pipe; give a file name"
    assert Path("/dev/null").is_char_device()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert told(file) == f"cannot write {file}: no permission to write in {tmp_path}; give another folder"
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["mkstemp", "write", "fsync", "replace"])
def test_a_failure_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        if where == "write":
            fail()

    targets = {"mkstemp": "tempfile.mkstemp", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}
    if where in targets:
        monkeypatch.setattr(targets[where], fail)
    with pytest.raises(ll.InputError) as caught:
        write_atomically(path, write)
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; what was there before is unchanged, give another place"
    )
    assert files(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()])
def test_other_failures_pass_and_leave_nothing(tmp_path: Path, error: BaseException) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "a.txt", write)
    assert files(tmp_path) == []


def test_a_disk_that_is_really_full(tmp_path: Path, llama: ll.Model) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        reading = ll.read(llama, [[5] * 60], sites="resid,head_out", top_k=20)
        (disk / "old.parquet").write_bytes(b"older")
        for path in (disk / "old.parquet", disk / "new.parquet"):
            with pytest.raises(ll.InputError) as caught:
                reading.save(path)
            assert str(caught.value).startswith(f"cannot write {path}: ")
            assert "No space left on device" in str(caught.value)
        with pytest.raises(ll.InputError, match="No space left on device"):
            write_text(disk / "new.txt", "x" * 100_000)
        assert files(disk) == ["old.parquet"]
        assert (disk / "old.parquet").read_bytes() == b"older"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    texts = [str(i) * 50_000 for i in range(4)]
    threads = [threading.Thread(target=lambda t=t: [write_text(path, t) for _ in range(10)]) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert files(tmp_path) == ["a.txt"]


HALF = """
import sys, time
from pathlib import Path
from logitlab.files import write_atomically
def write(temporary):
    temporary.write_text("half of the ne")
    print("half", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    assert path.read_text() == "old"
    if number == signal.SIGINT:  # a process that can still act takes its half away
        assert files(tmp_path) == ["a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_under_safetensors(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    path = write_text(tmp_path / "a", "old")

    def write(temporary: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error:\nNo space left on device (os error 28)")

    with pytest.raises(ll.InputError) as caught:
        write_atomically(path, write)
    assert str(caught.value) == (
        f"cannot write {path}: Error while serializing: I/O error: No space left on device (os error 28); "
        "what was there before is unchanged, give another place"
    )
    assert (files(tmp_path), path.read_text()) == (["a"], "old")


def test_a_lock_names_its_process_and_goes_with_it(tmp_path: Path) -> None:
    one, busy = tmp_path / "one.lock", rf"another run \(process {os.getpid()}\) is at work in"
    with locked(one, "run"):
        with pytest.raises(ll.InputError, match=busy), locked(one, "run"):
            pass
        with locked(tmp_path / "two.lock", "run"):
            pass
    with locked(one, "run"):
        pass
    with pytest.raises(ll.InputError, match="cannot write in"), locked(tmp_path / "nowhere" / "one.lock", "run"):
        pass
