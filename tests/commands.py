"""Running the command line in a test, in this process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logitlab import cli

COMMAND = [sys.executable, "-c", "from logitlab.cli import run; run()"]
"""The `logitlab` command of the environment that runs the tests."""


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """The one line with which a command is refused; nothing else may have been printed."""
    found, out, err = run(capsys, *arguments)
    return one_line(found, out, err, code)


def one_line(found: int, out: str, err: str, code: int = 2) -> str:
    """Check what a refused command has printed; return its message."""
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("logitlab: ")
    assert "Traceback" not in err
    assert found == code, err
    return err.removeprefix("logitlab: ").removesuffix("\n")


def spawn(*arguments: Any, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own, without a terminal and without the hub."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=b"" if stdin is None else stdin,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=120,
        check=False,
    )


def files(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
