"""Real GGUF files of a tiny model: exact conversion, broken files, killed conversions."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab.models import cache, gguf
from tests import tiny_gguf, zoo
from tests.commands import files, refused


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny GGUF file, and the model whose weights it holds."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write(path)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own: the folder that holds converted files."""
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_conversion_is_exact(original: tuple[Path, Any], home: Path) -> None:
    path, source = original
    model = ll.load(path)
    assert (model.name, model.dtype) == ("tiny", torch.float32)
    mine, own = model.module.state_dict(), source.state_dict()
    assert mine.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(mine[name], value), name
    text = "The capital of France"
    assert model.tokenizer(text)["input_ids"] == zoo.tokenizer()(text)["input_ids"]
    (folder,) = home.iterdir()
    assert json.loads((folder / gguf.RECORD).read_text())["source"] == "tiny.gguf"
    assert {"name": str(folder), "what": "converted from tiny.gguf", "where": "logitlab's cache"} in cache.available()


def test_a_folder_without_its_record_is_made_again(original: tuple[Path, Any], home: Path) -> None:
    folder = gguf.converted(original[0])
    (folder / gguf.RECORD).unlink()
    (folder / gguf.WEIGHTS).write_bytes(b"half")
    assert [m for m in cache.available() if str(home) in m["name"]] == []
    assert gguf.converted(original[0]) == folder
    assert ll.load(folder).n_layers == 3
    assert [p.name for p in home.iterdir()] == [folder.name]


def test_records_that_no_conversion_wrote_are_passed_over(home: Path) -> None:
    for name, text in {"a": "{", "b": "[]", "c": "{}"}.items():
        (home / name).mkdir(parents=True)
        (home / name / gguf.RECORD).write_text(text)
    assert [m for m in cache.available() if "converted from" in m["what"]] == []
    assert cache.converted_default() is None


def test_truncated_and_random_files(
    original: tuple[Path, Any], tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = original[0].read_bytes()
    noise = random.Random(3)
    contents = [whole[:n] for n in (4, 8, 12, 24, 30, 1000, 9000, len(whole) // 2, len(whole) - 1)]
    contents += [b"GGUF" + noise.randbytes(3000), b"GGUF\x03\0\0\0" + noise.randbytes(3000)]
    contents += [b"GGUF\x03\0\0\0" + bytes(16), whole[:5000] + noise.randbytes(2000)]
    file = tmp_path / "spoiled.gguf"
    for content in contents:
        file.write_bytes(content)
        pattern = rf"{re.escape(str(file))} is (corrupt or )?truncated: .+; download or copy it again"
        assert re.fullmatch(pattern, refused(capsys, "verify", file))
    for content in (b"", b"GGU", b"GGML" + whole[4:]):
        file.write_bytes(content)
        assert refused(capsys, "verify", file) == (
            f"{file} is not a GGUF file (it does not begin with the letters GGUF); download or copy it again"
        )
    assert not home.exists()


def test_an_architecture_that_transformers_cannot_convert(
    original: tuple[Path, Any], tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "odd.gguf"
    file.write_bytes(original[0].read_bytes().replace(b"llama", b"lLaMx"))
    pattern = rf"transformers cannot convert {re.escape(str(file))}: .+; try another file, or the original model"
    assert re.fullmatch(pattern, refused(capsys, "verify", file))
    assert files(home) == []


def test_a_cache_that_cannot_be_used(
    original: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    pattern = (
        rf"cannot keep the converted model in {re.escape(str(tmp_path / 'cache' / 'gguf'))}: .+; "
        "free some space, or set LOGITLAB_CACHE to another folder"
    )
    assert re.fullmatch(pattern, refused(capsys, "verify", original[0]))


def test_a_full_disk_while_weights_are_written(
    original: tuple[Path, Any], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    capsys.readouterr()
    with pytest.raises(ll.InputError) as caught:
        gguf.converted(original[0])
    assert str(caught.value) == (
        f"cannot keep the converted model in {home}: I/O error: No space left on device (os error 28); "
        "free some space, or set LOGITLAB_CACHE to another folder"
    )
    assert files(home) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from logitlab.models import gguf
where = sys.argv[2]
if where == "weights":  # the moment before they are written
    import safetensors.torch
    safetensors.torch.save_file = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
else:  # everything is written, nothing is in place
    gguf._move = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
gguf.converted(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("where", ["weights", "move"])
def test_killed_while_converting(original: tuple[Path, Any], home: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(original[0]), where], capture_output=True, env=dict(os.environ), check=False
    )
    assert done.returncode == -9
    (left,) = home.iterdir()
    assert left.name.startswith(gguf.UNFINISHED)
    assert [m for m in cache.available() if str(home) in m["name"]] == []
    folder = gguf.converted(original[0])
    assert torch.equal(ll.load(folder).module.lm_head.weight, original[1].lm_head.weight)
