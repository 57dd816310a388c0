"""What the functions of a study are given: parameters, the model, random numbers, tables, arrays."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.errors import InputError
from logitlab.files import write_atomically
from logitlab.studies.folder import RunFolder, make_folder
from logitlab.studies.parameters import Parameters
from logitlab.studies.study import Scale, Study

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from logitlab.models.handle import Model

_ARRAYS = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: name of the step.
        unit: name of the unit that is at work, empty if the step has only one.
        units_done: units of this step that are done.
        units: how many it has.
        done: how much of the unit is done, in whatever the step counts.
        total: how much there is; None if that is not known.
        words: what is going on.
    """

    step: str
    unit: str
    units_done: int
    units: int
    done: int = 0
    total: int | None = None
    words: str = ""


class Run:
    """One run of a study.

    Attributes:
        study: the study.
        parameters: their values, as attributes too.
        scale: ``smoke``, ``small`` or ``full``.
        seed: whole number that all random numbers derive from.
        folder: where the run keeps its files.
    """

    def __init__(
        self,
        study: Study,
        parameters: Parameters,
        scale: Scale,
        seed: int,
        files: RunFolder,
        *,
        model: Model | None = None,
        tell: Callable[[int, int | None, str], None] | None = None,
    ) -> None:
        self.study = study
        self.parameters = parameters
        self.scale: Scale = scale
        self.seed = seed
        self.folder: Path = files.path
        self._files = files
        self._model = model
        self._tell = tell

    def __repr__(self) -> str:
        return f"Run({self.study.name}, {self.scale}, seed {self.seed}, in {self.folder})"

    @property
    def model(self) -> Model:
        """The model.

        Raises:
            InputError: the study was declared without one, or claims and pictures ask, which are made from tables
                alone.
        """
        if self._model is None:
            why = "claims and pictures are made from tables: keep there what they need"
            why = why if self.study.needs_model else "needs_model is False"
            raise InputError(f"study {self.study.name} has no model here: {why}")
        return self._model

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What is recorded of the run so far, plain values; ``manifest["model"]["name"]`` is the model's name."""
        return json.loads(json.dumps(self._files.record))

    def rng(self, *names: str | int) -> np.random.Generator:
        """Random numbers that depend on the seed and the names alone, not on what was drawn before.

        Args:
            names: what the numbers are for, for instance the step, the unit and the control.

        Example:
            ``run.rng("random directions", unit).standard_normal(64)``
        """
        digest = hashlib.sha256(json.dumps([self.seed, *names]).encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def table(self, name: str) -> pd.DataFrame:
        """A table of an earlier step, all units below each other; changing it changes nothing on disk.

        Args:
            name: the step's, or ``STEP-TABLE`` where it gives several.

        Raises:
            InputError: there is no such table yet.
        """
        return self._files.table(name)

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor | np.ndarray]) -> Path:
        """Write tensors as ``arrays/NAME.safetensors``, in one step; what had that name before is replaced.

        Args:
            name: letters, digits, hyphens, dots and _; tell units apart in it.
            tensors: by name.

        Raises:
            InputError: the name cannot be used, or the file cannot be written.

        Example:
            ``run.keep(f"vectors-{unit}", {"mean": mean})``
        """
        import torch
        from safetensors.torch import save_file

        file = self._array_file(name)
        kept = {
            key: (v.detach().cpu() if isinstance(v, torch.Tensor) else torch.from_numpy(np.array(v)))
            .contiguous()
            .clone()
            for key, v in tensors.items()
        }
        make_folder(file.parent)
        return write_atomically(file, lambda path: save_file(kept, path))

    def arrays(self, name: str) -> dict[str, torch.Tensor]:
        """What `keep` has written.

        Raises:
            InputError: there is nothing of that name, or it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._array_file(name)
        if not file.is_file():
            raise InputError(f"there are no arrays {name!r} in {self.folder}: no step has kept them")
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:160]}") from error

    def progress(self, done: int, total: int | None = None, words: str = "") -> None:
        """Say how far the unit at work is."""
        if self._tell is not None:
            self._tell(done, total, words)

    def _array_file(self, name: str) -> Path:
        if not _ARRAYS.fullmatch(name):
            raise InputError(f"arrays are called {name!r}; use letters, digits, hyphens, dots and _, at most 100")
        return self.folder / "arrays" / f"{name}.safetensors"
