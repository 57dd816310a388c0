"""A fitted lens: a map for each of some sites of one model, with the record of how it came about; and its file.

On disk it is a folder: ``lens.json``, which says what it is, and the safetensors file that it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from logitlab.errors import InputError
from logitlab.files import write_atomically, write_text
from logitlab.lenses.maps import Maps, maps_of
from logitlab.models.handle import Model
from logitlab.models.sites import Site, parse_spec

RECORD = "lens.json"
FORMAT = 1

OURS = re.compile(r"(lens|fit|jacobian)\.json|(maps|fit|jacobian)-\w+\.safetensors|\..*\.part")
"""Names of files that a lens, or a fit that is going on, has in its folder."""


@dataclass
class FittedLens:
    """A map for each of some sites, applied before the model's own tail.

    Attributes:
        maps: the maps, one stack of parameters.
        sites: the sites that they belong to, in the same order.
        model: what the lens was fitted on: ``name``, ``fingerprint`` (None where it is not known), ``stack``,
            ``width`` and ``layers``.
        recipe: how it was fitted: plain values.
        corpus: what it was fitted on: plain values.
        metrics: what was measured, by site.

    Example:
        ``read(model, "The capital of France is", lens=load_lens("tuned"))``
    """

    maps: Maps
    sites: Sequence[Site]
    model: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    corpus: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.maps.requires_grad_(False)
        self._index = {_home(site): i for i, site in enumerate(self.sites)}

    @property
    def name(self) -> str:
        """What the lens is called in readings."""
        return self.maps.title

    @property
    def kind(self) -> str:
        """Which family its maps are of."""
        return self.maps.kind

    def check(self, model: Model, sites: Sequence[Site]) -> None:
        """Raise `InputError` if the lens belongs to another model, or has no map for a site."""
        mine = self.model
        if mine["width"] != model.width or mine.get("layers") not in (None, model.n_layers):
            raise InputError(
                f"this {self.name} is for {mine['name']} ({mine['layers']} layers of width {mine['width']}); "
                f"{model.name} has {model.n_layers} layers of width {model.width}: fit one on it"
            )
        if _home(model.last_site) in self._index:
            raise InputError(f"this {self.name} has a map for {model.last_site}, which the model itself decodes")
        deep = next((site for site in self.sites if site.layer >= model.n_layers), None)
        if deep is not None:
            raise InputError(f"this {self.name} has a map for {deep}, and {model.name} has {model.n_layers} layers")
        if mine.get("stack") not in (None, model.stack.name):
            raise InputError(
                f"this {self.name} is for the stack {mine['stack']} of {mine['name']}, and {model.stack.name} is read"
            )
        if mine.get("fingerprint") not in (None, model.fingerprint):
            raise InputError(
                f"this {self.name} was fitted on {mine['name']} with fingerprint {mine['fingerprint'][:12]}, and "
                f"{model.name} has {model.fingerprint[:12]}: these are other weights (or another dtype). Fit one on "
                "this model, or load the lens with any_weights=True (--any-weights) if you know that it suits"
            )
        if mine.get("unembedding") not in (None, unembedding_digest(model)):
            raise InputError(
                f"this {self.name} was fitted on {mine['name']}, whose unembedding is not that of {model.name}: fit "
                "one on this model, or load the lens with any_weights=True (--any-weights) if you know that it suits"
            )
        missing = [site for site in sites if _home(site) not in self._index and site != model.last_site]
        if missing:
            has = ", ".join(map(str, self.sites[:3])) + (", ..." if len(self.sites) > 3 else "")
            raise InputError(
                f"this {self.name} has no map for {missing[0]}; it has {has} ({len(self.sites)} sites): choose among "
                "them, or fit one for that site"
            )

    def transport(self, hidden: torch.Tensor, site: Site) -> torch.Tensor:
        """Map hidden states of one site, [..., width] to [..., width]; the last block's output is left as it is."""
        index = self._index.get(_home(site))
        if index is None:
            return hidden
        if next(self.maps.parameters()).device != hidden.device:
            self.maps.to(hidden.device)
        with torch.set_grad_enabled(hidden.requires_grad and torch.is_grad_enabled()):  # as in the model's tail
            return self.maps.one(hidden, index)

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        return {"name": self.name, "kind": self.kind, "digest": self.digest[:16], **self.maps.options()}

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the parameters."""
        found = hashlib.sha256()
        for name, value in sorted(self.maps.state_dict().items()):
            found.update(f"{name} {tuple(value.shape)}".encode())
            found.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    # -- on disk -------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the lens into a folder, which is made; a lens that is there is replaced in one step.

        Raises:
            InputError: the folder cannot be written, or holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"cannot write a lens to {folder}: it is a file; give a folder")
        if folder.is_dir() and not (folder / RECORD).is_file() and _foreign(folder):
            raise InputError(f"cannot write a lens to {folder}: it holds something else; give a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
        digest = self.digest
        file = f"maps-{digest[:12]}.safetensors"
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.maps.state_dict().items()}
        write_atomically(folder / file, lambda path: save_file(tensors, path))
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "options": self.maps.options(),
            "sites": [str(site) for site in self.sites],
            "file": file,
            "digest": digest,
            "model": self.model,
            "recipe": self.recipe,
            "corpus": self.corpus,
            "metrics": self.metrics,
        }
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
        for old in folder.glob("maps-*.safetensors"):
            if old.name != file:
                old.unlink()
        return folder

    @staticmethod
    def load(folder: str | Path) -> FittedLens:
        """Read a lens from a folder that `save` has written; see `logitlab.load_lens` for other forms.

        Raises:
            InputError: there is no lens, or it is damaged.
        """
        folder = Path(folder)
        record = read_record(folder / RECORD)
        if record.get("format") != FORMAT:
            raise InputError(
                f"{folder / RECORD} is of format {record.get('format')}; this version reads {FORMAT}: update logitlab"
            )
        try:
            sites = [site_of(text) for text in record["sites"]]
            width = int(record["model"]["width"])
            maps = maps_of(record["kind"], len(sites), width, **record["options"])
            maps.load_state_dict(load_file(folder / record["file"]))
            plain = [record[name] for name in ("model", "recipe", "corpus", "metrics")]
            if not all(isinstance(value, dict) for value in plain):
                raise TypeError("a part of its record is no object")
            lens = FittedLens(maps, sites, *plain)
            digest = record["digest"]
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the lens in {folder} is damaged ({' '.join(str(error).split())[:200]}): write it again"
            ) from error
        if lens.digest != digest:
            raise InputError(f"the lens in {folder} is damaged: {record['file']} is not the file that was written")
        return lens

    def for_any_weights(self) -> FittedLens:
        """The same lens, which then also serves models of the same shape with other weights."""
        free = self.model | {"fingerprint": None, "unembedding": None}
        return FittedLens(self.maps, self.sites, free, self.recipe, self.corpus, self.metrics)


def unembedding_digest(model: Model) -> str | None:
    """What tuned-lens knows a model's unembedding by; None where the model has no linear head.

    It is the SHA-256 of how numpy prints the corners of the matrix with one decimal, so it is the same in half
    precision, and not proof against small changes.
    """
    head = model.tail.head
    if head is None:
        return None
    options: Any = {"edgeitems": 3, "threshold": 1000, "linewidth": 75, "suppress": False, "floatmode": "maxprec"}
    with np.printoptions(**options, sign="-", nanstr="nan", infstr="inf", formatter=None):
        printed = np.array_str(head.weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(printed.encode()).hexdigest()


def identity(model: Model, kind: str, sites: Any = None, **options: int) -> FittedLens:
    """A lens of some kind that has not been fitted: it equals the logit lens.

    Args:
        model: the model.
        kind: one of `logitlab.lenses.FAMILIES`.
        sites: which sites, as in `logitlab.read`; by default the residual stream.
        options: ``rank`` of a low-rank lens.

    Raises:
        InputError: there is no such kind or site.
    """
    chosen = list(dict.fromkeys(_home(s) for s in model.select_sites(sites) if s != model.last_site))
    if not chosen:
        raise InputError(f"only {model.last_site} is selected, which the model itself decodes: name an earlier site")
    return FittedLens(maps_of(kind, len(chosen), model.width, **options), chosen, model.about)


def check_folder(place: str | Path, state: str) -> Path:
    """A folder in which a fit can begin, or go on from its file ``state``.

    Raises:
        InputError: it is a file, or holds something else: another lens, say.
    """
    folder = Path(place)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the lens")
    if folder.is_dir() and not (folder / state).is_file() and ((folder / RECORD).exists() or _foreign(folder)):
        raise InputError(f"{folder} is not empty and holds no fit that could go on; give a new folder")
    return folder


def _foreign(folder: Path) -> bool:
    """Whether something in a folder is neither of a lens nor of a fit that was broken off."""
    return any(not OURS.fullmatch(p.name) for p in folder.iterdir())


def _home(site: Site) -> Site:
    """What enters a block is what the one before it gave: one site has one map."""
    return Site(site.layer - 1, "resid_post") if site.kind == "resid_pre" and site.layer > 0 else site


def site_of(text: str) -> Site:
    """The site of its full name, for instance ``3.resid_post``."""
    spec = parse_spec(text)
    if not isinstance(spec.layers, int) or spec.layers < 0:
        raise InputError(f"{text!r} is not one site")
    return Site(spec.layers, spec.kind, spec.index)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it is not there, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no lens in {path.parent}: {path.name} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not the record of a lens")
    return found
