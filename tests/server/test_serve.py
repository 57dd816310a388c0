"""The command: what it prints, where it listens, what it refuses, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from logitlab.errors import InputError
from logitlab.server import doorway
from logitlab.server.serve import listening
from tests.commands import COMMAND, refused
from tests.server.running import events_of

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/#token=([\w-]+)\n")


class Command:
    """`logitlab serve` at work.

    Attributes:
        process: the process.
        port: its port.
        token: its token.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        assert process.stdout is not None
        line = process.stdout.readline()
        found = ADDRESS.fullmatch(line)
        assert found is not None, (line, log.read_text())
        self.port, self.token = int(found[1]), found[2]
        headers = {"authorization": f"Bearer {self.token}"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)

    def end(self) -> tuple[int, float]:
        """Ctrl-C: exit code, and seconds until it had ended."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20), time.monotonic() - begun


@contextmanager
def serving(tmp_path: Path, *arguments: Any, **environment: str) -> Generator[Command]:
    log = tmp_path / "stderr"
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(tmp_path / "state")} | environment
    command = [*COMMAND, "serve", "--port", "0", *map(str, arguments)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ, start_new_session=True
        )
    try:
        yield Command(process, log)
    finally:
        process.kill()
        process.wait()


def test_from_start_to_end(tmp_path: Path, checkpoint: Path) -> None:
    with serving(tmp_path, "-m", checkpoint, "--max-tokens", 60, "--dtype", "float32") as command:
        about = command.client.get("/api/about").json()
        assert [model["name"] for model in about["models"]] == ["tiny-llama"]
        assert (about["limits"]["prompt_tokens"], about["history"]) == (60, True)
        read = {"do": "read", "model": "tiny-llama", "prompt": {"text": "The capital"}}
        events = events_of(command.client.post("/api/run", json=read).text)
        assert events[-1][0] == "result"
        assert "model = ll.load('tiny-llama', dtype='float32')  # " in events[-1][1]["python"]
        assert str(checkpoint.parent) not in json.dumps(events)
        assert len(command.client.get("/api/history").json()["entries"]) == 1
        assert len(list((tmp_path / "state" / "logitlab" / "history").iterdir())) == 1
        long = {"text": " the" * 50}
        patch = {**read, "do": "patch_all", "prompt": long, "source": {"text": " of" * 50}, "answers": ["id:5"]}
        with command.client.stream("POST", "/api/run", json=patch | {"sites": ["neuron"]}) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith('data: {"what": "patching"'))
            code, seconds = command.end()
            assert (code, next(line for line in lines if line.startswith("event: error"))) == (130, "event: error")
            assert seconds < 3
        log = command.log.read_text().splitlines()
        assert log[0] == "logitlab: loading tiny-llama"
        assert re.fullmatch(r"logitlab: loaded tiny-llama in \d+\.\d s", log[1])
        assert log[2:] == ["logitlab: stopped"]
        assert command.process.stdout is not None
        assert command.process.stdout.read() == ""  # one line, and nothing else
        assert command.token not in command.log.read_text()
        assert len(command.token) >= 40


def test_the_token_of_the_environment_and_ending_at_once(tmp_path: Path, checkpoint: Path) -> None:
    token = "chosen-by-the-user-0"
    with serving(tmp_path, "-m", checkpoint, "--no-history", LOGITLAB_TOKEN=token) as command:
        assert command.token == token
        code, seconds = command.end()  # while the model is being loaded
        assert code == 130
        assert seconds < 3
        assert "Traceback" not in command.log.read_text()
    assert not (tmp_path / "state").exists()


BROWSER = """#!/bin/sh
file=${1#file://}
cp "$file" "$SEEN"
stat -c '%a %n' "$file" >"$SEEN.mode"
"""


def test_the_browser_is_not_started_with_the_token(tmp_path: Path, checkpoint: Path) -> None:
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(BROWSER)
    browser.chmod(0o755)
    given = {"BROWSER": f"{browser} %s", "SEEN": str(seen), "TMPDIR": str(tmp_path)}
    with serving(tmp_path, "-m", checkpoint, "--no-history", "--open", **given) as command:
        until = time.monotonic() + 20
        while not (tmp_path / "seen.mode").exists() or not (tmp_path / "seen.mode").read_text().endswith("\n"):
            assert time.monotonic() < until
            time.sleep(0.02)
        entrance = f"http://127.0.0.1:{command.port}/#token={command.token}"
        assert f'location.replace("{entrance}")' in seen.read_text()
        mode, _, name = (tmp_path / "seen.mode").read_text().strip().partition(" ")
        assert mode == "600"
        assert Path(name).exists()
        assert command.end()[0] == 130
        assert not Path(name).exists()


def test_the_file_for_the_browser_goes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address))
    monkeypatch.setattr(doorway, "OPEN_SECONDS", 0.1)
    door = doorway.Doorway('http://[::1]:1/#token="</script>')
    text = door.path.read_text()
    assert text.count("</script>") == 1
    assert door.path.stat().st_mode & 0o777 == 0o600
    door.open()
    until = time.monotonic() + 10
    while door.path.exists() or not opened:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert opened == [door.path.as_uri()]
    door.close()  # once more costs nothing

    def full(**_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(InputError, match="--open needs a temporary file: No space left on device; leave it out"):
        doorway.Doorway("http://127.0.0.1:1/")


def test_other_machines_need_a_name(tmp_path: Path, checkpoint: Path) -> None:
    said = "logitlab: browsers of other machines are refused: name with --allow-host what they call this machine"
    with serving(tmp_path, "--host", "0.0.0.0", "--allow-remote", "-m", checkpoint, "--no-history") as command:
        assert command.end()[0] == 130
        assert said in command.log.read_text().splitlines()


# -- what is refused, each in one line -----------------------------------------------------------------


def test_tokens_that_are_too_weak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", "short", "fifteen-letters", "a" * 201, "with spaces in it 123", "semicolon;semicolon;"):
        monkeypatch.setenv("LOGITLAB_TOKEN", token)
        assert refused(capsys, "serve", "--port", 0) == (
            "LOGITLAB_TOKEN must be 16 to 200 letters, digits, - and _: unset it for a token made at random"
        )


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert refused(capsys, "serve", "--port", port) == (
            f"port {port} is in use: give another one with --port, or --port 0 for any"
        )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_other_machines(capsys: pytest.CaptureFixture[str], host: str) -> None:
    message = refused(capsys, "serve", "--port", 0, "--host", host)
    assert message.startswith(f"--host '{host}' ")
    if host:
        assert "give --allow-remote if that is meant" in message


def test_where_it_listens() -> None:
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        with listening(host, 0) as found:
            assert found.getsockname()[0].startswith("127.")
    with listening("0.0.0.0", 0, remote=True) as found:
        assert found.getsockname()[0] == "0.0.0.0"
    with pytest.raises(InputError, match="is no address of this machine"):
        listening("no.such.host.invalid", 0)
    with pytest.raises(InputError, match="cannot listen at"):
        listening("192.0.2.1", 0, remote=True)


def test_options_that_exclude_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "serve", "--history", tmp_path, "--no-history")
    assert message == "--history and --no-history exclude each other"


@pytest.mark.parametrize("name", ["http://name", "name/path", "", "a b", "*", "name:port", "[zz]"])
def test_names_that_are_none(capsys: pytest.CaptureFixture[str], name: str) -> None:
    message = refused(capsys, "serve", "--port", 0, "--allow-host", name)
    assert message == f"--allow-host {name!r} is no name: give NAME or NAME:PORT, without http://"


def test_lenses_vectors_and_histories_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    start = ("serve", "--port", 0, "--no-history")
    assert refused(capsys, *start, "--lens", gone) == f"there is no lens at {gone}: no such file or folder"
    assert refused(capsys, *start, "--vectors", gone) == f"there are no vectors at {gone}: no such file"
    (tmp_path / "file").write_text("")
    message = refused(capsys, "serve", "--port", 0, "--history", tmp_path / "file" / "h")
    assert message.startswith(f"cannot make the folder {tmp_path / 'file' / 'h'} for the history: ")


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert refused(capsys, "serve") == "the app needs fastapi: pip install 'logitlab[app]'"


def test_help_is_quick() -> None:
    script = (
        "import sys; from logitlab.cli import main; main(['--help']); main(['serve', '--help']); "
        "print([m for m in ('fastapi', 'uvicorn', 'starlette', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--allow-remote" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_socket_is_not_left_open_when_the_start_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(capsys, "serve", "--port", port, "--no-history", "--lens", tmp_path / "gone")
    with listening("127.0.0.1", port):
        pass
