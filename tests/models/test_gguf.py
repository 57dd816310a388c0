"""The conversion of GGUF files: exact, once, and safe to kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import logitlab as ll
from logitlab.models import cache, gguf
from logitlab.models.cache import default_gguf


def test_weights_are_the_files_own(default_model: ll.Model) -> None:
    reader_module = pytest.importorskip("gguf")
    source = default_gguf()
    assert source is not None
    tensors = {t.name: t for t in reader_module.GGUFReader(source).tensors}
    tensor = tensors["blk.7.ffn_down.weight"]
    truth = torch.from_numpy(reader_module.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    own = default_model.module.model.layers[7].mlp.down_proj.weight.detach()
    assert torch.equal(own, truth.reshape(own.shape))
    assert default_model.dtype == torch.float32
    head = default_model.tail.head
    assert head is not None
    assert head.weight.data_ptr() == default_model.module.model.embed_tokens.weight.data_ptr()


def test_the_second_load_does_not_convert(default_model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf, "_convert", never)
    source = default_gguf()
    assert source is not None
    folder = gguf.converted(source)
    assert (folder / "model.safetensors").is_file()
    assert cache.converted_default() == folder


def fake(path: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that passes for GGUF; the conversion itself is replaced."""
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_reader", lambda path: None)
    monkeypatch.setattr(gguf, "_convert", fake)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and more")
    return file


SLOW = """
import sys, time
from pathlib import Path
from logitlab.models import gguf
def slow(path, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
gguf._reader = lambda path: None
gguf._convert = slow
gguf.converted(Path(sys.argv[1]))
"""


def test_killed_while_converting(quick: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(quick)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list((cache.cache_folder() / "gguf").iterdir())
    assert [p.name.startswith(gguf.UNFINISHED) for p in left] == [True]
    assert cache.available()[1:] == [] or all("converted" not in m["what"] for m in cache.available())
    folder = gguf.converted(quick)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert left[0].exists()  # another process might still be at it
    old = time.time() - 2 * gguf.STALE
    os.utime(left[0], (old, old))
    other = quick.with_name("other.gguf")
    other.write_bytes(b"GGUF of another kind")
    gguf.converted(other)
    assert not left[0].exists()


def test_a_failed_conversion_leaves_nothing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, folder: Path) -> None:
        fake(path, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    with pytest.raises(ll.InputError, match=r"No space left on device; free some space, or set LOGITLAB_CACHE"):
        gguf.converted(quick)
    assert list((cache.cache_folder() / "gguf").iterdir()) == []


def test_files_with_one_name_do_not_mix(quick: Path) -> None:
    first = gguf.converted(quick)
    quick.write_bytes(b"GGUF but changed")
    assert gguf.converted(quick) != first


def test_without_the_extra_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and more")
    with pytest.raises(ll.InputError, match=r"pip install 'logitlab\[gguf\]'"):
        ll.load(file)
