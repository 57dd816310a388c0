"""Vectors: one for each of some sites of a model, with the record of how they came about; and their file.

On disk they are one safetensors file. Its header says what they are, for which model, and how they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from logitlab.errors import InputError
from logitlab.files import write_atomically
from logitlab.interventions.changes import vector_of
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number
from logitlab.models.sites import Site

FORMAT = 1


@dataclass(frozen=True)
class Vectors:
    """A vector for each of some sites of one model.

    Attributes:
        values: by the name of the site, a vector [width] float32, in the units of the residual stream.
        kind: how they were made, in words: ``mean difference``, say.
        model: what they were made on, see `logitlab.Model.about`.
        recipe: how they were made: plain values.

    Example:
        ``intervene(model, add("12.resid_post", mean_difference(model, glad, sad), strength=2, positions="each"))``
    """

    values: Mapping[str, torch.Tensor]
    kind: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        found: dict[str, torch.Tensor] = {}
        for site, value in self.values.items():
            one = vector_of(value, f"the vector for {site}").detach().to("cpu", torch.float32, copy=True)  # their own
            if one.shape != (self.model["width"],):
                raise InputError(
                    f"the vector for {site} has shape {list(one.shape)}; states of {self.model['name']} have width "
                    f"{self.model['width']}"
                )
            found[str(site)] = one
        if not found:
            raise InputError("there is no site: vectors need at least one")
        object.__setattr__(self, "values", found)

    def __repr__(self) -> str:
        sites = list(self.values)
        some = ", ".join(sites[:3]) + (f", ... {sites[-1]}" if len(sites) > 3 else "")
        return f"Vectors({self.kind}, {self.model['name']}: {some})"

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self.values)

    def __getitem__(self, site: str | Site) -> torch.Tensor:
        """The vector of a site, [width] float32.

        Raises:
            InputError: there is none.
        """
        if str(site) not in self.values:
            some = ", ".join(self.sites[:8]) + (", ..." if len(self.sites) > 8 else "")
            raise InputError(f"there is no vector ({self.kind}) for {site}; there are vectors for {some}")
        return self.values[str(site)]

    def check(self, model: Model) -> None:
        """Raise `InputError` if the vectors belong to another model."""
        mine = self.model
        if mine["width"] != model.width or mine.get("layers") not in (None, model.n_layers):
            raise InputError(
                f"these vectors are for {mine['name']} ({mine.get('layers')} layers of width {mine['width']}); "
                f"{model.name} has {model.n_layers} layers of width {model.width}: make them on it"
            )
        if mine.get("stack") not in (None, model.stack.name):
            raise InputError(
                f"these vectors are for the stack {mine['stack']} of {mine['name']}, and {model.stack.name} is read"
            )
        if mine.get("fingerprint") not in (None, model.fingerprint):
            raise InputError(
                f"these vectors were made on {mine['name']} with fingerprint {mine['fingerprint'][:12]}, and "
                f"{model.name} has {model.fingerprint[:12]}: these are other weights (or another dtype). Make them on "
                "this model, or use for_any_weights() if you know that they suit"
            )

    def for_any_weights(self) -> Vectors:
        """The same vectors, which then also serve models of the same shape with other weights."""
        return Vectors(self.values, self.kind, {**self.model, "fingerprint": None}, self.recipe)

    def alone(self, site: str | Site) -> Vectors:
        """The vector of one site by itself."""
        return Vectors({str(site): self[site]}, self.kind, self.model, self.recipe)

    def norm(self, site: str | Site) -> float:
        """Euclidean length of the vector of a site."""
        return float(self[site].double().norm())

    def random_twin(self, seed: int = 0) -> Vectors:
        """For each site a vector of random direction (uniform on the sphere) and of the same length: a control.

        Args:
            seed: of the draw; the direction at a site depends on nothing else.

        Raises:
            InputError: the seed is not a whole number of at least 0.
        """
        if whole_number(seed, "seed") < 0:
            raise InputError(f"seed is {seed}; it must be at least 0")
        found: dict[str, torch.Tensor] = {}
        for site, value in self.values.items():
            digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            drawn = torch.randn(len(value), generator=generator, dtype=torch.float64)
            found[site] = (drawn / drawn.norm() * value.double().norm()).float()
        recipe = {"of": {"kind": self.kind, "digest": self.digest[:16], **self.recipe}, "seed": seed}
        return Vectors(found, "random of the same length", self.model, recipe)

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of sites and numbers."""
        found = hashlib.sha256()
        for site, value in self.values.items():
            found.update(site.encode())
            found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        return {"vectors": self.kind, "digest": self.digest[:16]}

    # -- on disk -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write them to a safetensors file, in one step.

        Raises:
            InputError: the name has another ending, the file cannot be written, or the recipe has something in it that
                is no plain value.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"cannot write {path}: the name of a file of vectors ends in .safetensors")
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "sites": self.sites,
            "digest": self.digest,
            "model": dict(self.model),
            "recipe": dict(self.recipe),
        }
        tensors = {site: value.contiguous() for site, value in self.values.items()}
        try:
            metadata = {"logitlab.vectors": json.dumps(record)}
        except (TypeError, ValueError) as error:
            raise InputError(
                f"cannot write {path}: the recipe is not made of plain values ({' '.join(str(error).split())})"
            ) from error
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @staticmethod
    def load(path: str | Path) -> Vectors:
        """Read what `save` has written.

        Raises:
            InputError: there is no such file, or it is no file of vectors, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there are no vectors at {path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no safetensors file, or damaged ({' '.join(str(error).split())})") from error
        if "logitlab.vectors" not in metadata:
            raise InputError(f"{path} is a safetensors file, and not one of vectors: its header does not say for what")
        try:
            record: dict[str, Any] = json.loads(metadata["logitlab.vectors"])
            if record["format"] != FORMAT:
                raise InputError(
                    f"{path} is of format {record['format']}; this version reads {FORMAT}: update logitlab"
                )
            values = {site: tensors[site] for site in record["sites"]}
            found = Vectors(values, record["kind"], record["model"], record["recipe"])
            digest = record["digest"]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): write it again") from error
        if found.digest != digest:
            raise InputError(f"{path} is damaged: its numbers are not those that were written")
        return found
