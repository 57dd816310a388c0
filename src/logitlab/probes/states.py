"""States of many sites, one site at a time: from memory, or from a file that capture has filled batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from logitlab.errors import InputError
from logitlab.files import difference, locked, write_text
from logitlab.models.capture import Activations, capture_encoded
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.sites import Site
from logitlab.probes.labels import Matrix, matrix

FILE, RECORD, LOCK = "states.npy", "states.json", ".lock"
CHUNK = 256  # prompts that are captured before their states are written


class States(Protocol):
    """Where probes read states."""

    sites: tuple[str, ...]
    rows: int

    def read(self, site: int) -> Matrix:
        """States [rows, width] of one site.

        Raises:
            InputError: they are NaN.
        """
        ...


class Held:
    """States in memory: activations, or matrices by the name of their site."""

    def __init__(self, given: Any) -> None:
        self._given = given
        if isinstance(given, Activations):
            self.sites = tuple(map(str, given.sites))
            self.rows = sum(map(len, given.positions))
            return
        if not isinstance(given, Mapping) or not given:
            raise InputError(
                "give Activations from logitlab.capture, or states [rows, width] by the name of their site"
            )
        self.sites = tuple(map(str, given))
        shapes = {str(site): list(getattr(states, "shape", ())) for site, states in given.items()}
        first, shape = next(iter(shapes.items()))
        for site, own in shapes.items():
            if len(own) != 2 or own[0] != shape[0]:
                raise InputError(
                    f"the states of {site} have the shape {own}, those of {first} {shape}: give matrices "
                    "[rows, width] of the same rows"
                )
        self.rows = int(shape[0])

    def read(self, site: int) -> Matrix:
        """See `States`."""
        name = self.sites[site]
        found = self._given[name] if isinstance(self._given, Activations) else list(self._given.values())[site]
        return matrix(found, f"the states of {name}")


class Filed:
    """States in one float32 file [sites, rows, width], mapped into memory."""

    def __init__(self, path: Path, sites: Sequence[str]) -> None:
        self._array: Any = np.load(path, mmap_mode="r")
        self.sites = tuple(sites)
        self.rows = int(self._array.shape[1])

    def read(self, site: int) -> Matrix:
        """See `States`."""
        return matrix(self._array[site], f"the states of {self.sites[site]}")


def file_states(
    model: Model,
    prompts: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Sequence[int],
    folder: str | Path,
    progress: Callable[[int], None],
) -> Filed:
    """Capture one state a prompt at some sites into a file; what a run that broke off has written is not done again.

    Args:
        model: the model.
        prompts: the prompts.
        sites: the sites.
        positions: the position of each prompt.
        folder: made where it is missing.
        progress: called with the number of prompts done.

    Raises:
        InputError: the folder holds other states, or cannot be written, or another run writes there.
    """
    folder = Path(folder)
    asked = repr([(key_of(p), at) for p, at in zip(prompts, positions, strict=True)])
    about = {
        "fingerprint": model.fingerprint,
        "stack": model.stack.name,
        "sites": [str(s) for s in sites],
        "rows": len(prompts),
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
    }
    with _alone(folder):
        _write(model, prompts, sites, positions, folder, about, progress)
    return Filed(folder / FILE, [str(s) for s in sites])


def _write(
    model: Model,
    prompts: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Sequence[int],
    folder: Path,
    about: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    done = _done(folder, about)
    path = folder / FILE
    shape = (len(sites), len(prompts), model.width)
    if not done:  # before the file is emptied, so that no record speaks of states that are gone
        _record(folder, 0, about)
    try:
        array: Any = np.lib.format.open_memmap(
            path, "r+" if done else "w+", dtype=np.float32, shape=None if done else shape
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write states to {path}: {error}; give another folder") from error
    if array.shape != shape:
        raise InputError(f"{path} has the shape {list(array.shape)} in place of {list(shape)}: empty the folder")
    progress(done)
    for start in range(done, len(prompts), CHUNK):
        some = slice(start, min(start + CHUNK, len(prompts)))
        kept = capture_encoded(model, prompts[some], sites, [[p] for p in positions[some]])
        for i, site in enumerate(sites):
            array[i, some] = kept.stacked([site])[0].float().cpu().numpy()
        array.flush()
        # Only now: what the record calls done is in the file.
        _record(folder, some.stop, about)
        progress(some.stop)


def _record(folder: Path, done: int, about: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps({"done": done, "states": about}) + "\n")


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Make the folder, and keep other runs from writing there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write states to {folder}: {error}; give another folder") from error
    with locked(folder / LOCK, "probe"):
        yield


def _done(folder: Path, about: dict[str, Any]) -> int:
    """How many prompts are done in a folder."""
    record = folder / RECORD
    if not record.exists():
        return 0
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        done, theirs = int(found["done"]), found["states"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} cannot be read ({error}): empty the folder, or give another") from error
    if theirs != about:
        raise InputError(f"{folder} holds states of something else ({difference(theirs, about)}): give another folder")
    return done if (folder / FILE).exists() else 0


def key_of(prompt: Encoded) -> Any:
    """What two prompts that are the same input have in common."""
    extra = tuple((name, _digest(value)) for name, value in sorted(prompt.extra.items()))
    return prompt.ids, prompt.encoder_ids, extra


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        given = value.detach().cpu().contiguous()
        digest = hashlib.sha256(given.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{given.dtype} {tuple(given.shape)} {digest}"
    return repr(value)
