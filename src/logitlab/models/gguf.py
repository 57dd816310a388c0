"""GGUF files: de-quantised once, kept as safetensors in the cache under the file's hash."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from logitlab.errors import InputError, ModelError
from logitlab.models.cache import cache_folder

log = logging.getLogger("logitlab")

WEIGHTS = "model.safetensors"
RECORD = "logitlab.json"
UNFINISHED = ".making-"
STALE = 24 * 60 * 60
"""Seconds after which an unfinished conversion counts as killed."""


def converted(path: Path) -> Path:
    """The folder with the safetensors copy of a GGUF file; it is made if it is not there yet.

    The values are exactly those that transformers de-quantises to, as float32. The folder appears
    in one step once it is complete, so a conversion that is killed leaves nothing behind that could
    be mistaken for a model.

    Raises:
        ModelError: the file is not a whole GGUF file, or transformers cannot convert it.
        InputError: the cache cannot be written, or ``gguf`` and ``accelerate`` are not installed.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path} is not a GGUF file (it does not begin with the letters GGUF); download or copy it again"
                )
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    folder = cache_folder() / "gguf" / digest[:32]
    if (folder / RECORD).is_file():
        return folder
    reader = _reader(path)
    log.info("converting %s to safetensors (once; kept in %s)", path.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as name:
            made = Path(name) / "model"
            made.mkdir()
            with _shared(reader, path):
                _convert(path, made)
            record = {"source": path.name, "sha256": digest, "transformers": version("transformers")}
            (made / RECORD).write_text(json.dumps(record), encoding="utf-8")
            _move(made, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot keep the converted model in {folder.parent}: {getattr(error, 'strerror', None) or error}; "
            "free some space, or set LOGITLAB_CACHE to another folder"
        ) from error
    return folder


def convert(path: Path, folder: Path) -> None:
    """Write the safetensors copy of a GGUF file into an existing folder, outside of the cache.

    Raises:
        ModelError: the file is not whole, or transformers cannot convert it.
        InputError: ``gguf`` and ``accelerate`` are not installed.
    """
    with _shared(_reader(path), path):
        _convert(path, folder)


def _sweep(folder: Path) -> None:
    """Remove what conversions that were killed more than a day ago left behind."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):  # another process may remove it at the same time
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not (folder / RECORD).is_file():  # another process may have finished first
            if not folder.exists():
                raise
            shutil.rmtree(folder)
            made.rename(folder)


def _reader(path: Path) -> Any:
    """What ``gguf`` has read of a file that is whole."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("reading a GGUF file needs two packages: pip install 'logitlab[gguf]'") from error
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # garbage can make the reader raise anything
        raise ModelError(f"{path} is corrupt or truncated: {error}; download or copy it again") from error
    if end == 0:
        raise ModelError(f"{path} is corrupt or truncated: it holds no weights; download or copy it again")
    if end > path.stat().st_size:
        raise ModelError(
            f"{path} is truncated: it has {path.stat().st_size} bytes of at least {end}; download or copy it again"
        )
    return reader


@contextmanager
def _shared(reader: Any, path: Path) -> Generator[None]:
    """Let transformers have this reader, and one table of names, where it would make each many times over.

    It asks ``gguf`` for them by name each time, so they are put there for as long as a conversion lasts. Otherwise
    they take most of its time.
    """
    import gguf

    package: Any = gguf
    own = package.GGUFReader, package.get_tensor_name_map

    def read(wanted: Any, *more: Any, **options: Any) -> Any:
        return reader if Path(wanted) == path else own[0](wanted, *more, **options)

    package.GGUFReader, package.get_tensor_name_map = read, cache(own[1])
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = own


def _convert(path: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except ImportError as error:
        raise InputError("reading a GGUF file needs two packages: pip install 'logitlab[gguf]'") from error
    except Exception as error:  # transformers raises whatever an odd file makes it stumble over
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"transformers cannot convert {path}: {why}; try another file, or the original model"
        ) from error
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the copy is not quantised
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    unique: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if unique.setdefault(tensor.data_ptr(), name) == name:  # tied tensors are stored once
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
